"""The bases are numbers with a definition: PEFT's, on every machine, for ever."""

import copy
import gc
import hashlib
import math
import pickle
import random
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft.tuners.randlora import RandLoraConfig as PeftConfig
from peft.tuners.randlora import RandLoraModel as PeftModel
from torch import nn

from process_wide import default_dtype, generators
from randlora.errors import BasisMismatchError
from randlora.ops import bf16
from randlora.ops.bases import Basis, BasisSpec, Dense, Ternary, basis_from_projections, get_basis, num_bases, ternary
from randlora.ops.bases.dense import DenseBases
from randlora.ops.bases.ternary import SparseBases, TernaryStored
from randlora.ops.operands import Sizes
from randlora.ops.units import unit

CPU, META = torch.device("cpu"), torch.device("meta")


def spec_of(
    rank: int,
    min_dim: int,
    max_dim: int,
    key: int = 0,
    sparsity: float | None = None,
    used: tuple[int, int] | None = None,
) -> BasisSpec:
    kind = Dense() if sparsity is None else Ternary(sparsity)
    return BasisSpec(rank, min_dim, max_dim, key, kind, *(used or (min_dim, max_dim)))


def spec_for_layers(shapes: list[tuple[int, int]], rank: int, key: int, kind: str) -> BasisSpec:
    """The spec of layers of (out, in) shapes, from PEFT's rule: the largest output and the largest input are drawn."""
    drawn = sorted((max(out for out, _ in shapes), max(in_ for _, in_ in shapes)))
    used = (max(min(shape) for shape in shapes), max(max(shape) for shape in shapes))
    sparsity = {"dense": None, "sparse": 3.0, "very_sparse": math.sqrt(drawn[0])}[kind]
    return spec_of(rank, *drawn, key=key % 2**32, sparsity=sparsity, used=used)


def peft_model(shapes: list[tuple[int, int]], rank: int, key: int, kind: str) -> PeftModel:
    model = nn.ModuleDict({f"layer{i}": nn.Linear(in_, out, bias=False) for i, (out, in_) in enumerate(shapes)})
    flags = {} if kind == "dense" else {kind: True}
    config = PeftConfig(r=rank, projection_prng_key=key, target_modules=list(model), **flags)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the std of a single value
        return PeftModel(model, config, "default")


KINDS = ["dense", "sparse", "very_sparse"]
dims = st.integers(1, 40)
shape_lists = st.lists(st.tuples(dims, dims), min_size=1, max_size=4)
keys = st.one_of(
    st.integers(0, 5), st.sampled_from([-1, -(2**63), 2**32, 2**32 + 3, 2**64 - 1]), st.integers(-(2**63), 2**63 - 1)
)


class TestSameNumbersAsPeft:
    @settings(deadline=None)
    @given(shapes=shape_lists, rank=st.integers(1, 50), key=keys, kind=st.sampled_from(KINDS))
    def test_bit_for_bit_over_random_models(self, shapes, rank, key, kind):
        theirs = peft_model(shapes, rank, key, kind)
        A, B = theirs.randlora_A["default"], theirs.randlora_B["default"]
        assume(A.isfinite().all() and B.isfinite().all())  # PEFT divides by the std also where it is 0 or none
        basis = get_basis(spec_for_layers(shapes, rank, key, kind))
        for layer in theirs.model.children():
            small, large = sorted((layer.in_features, layer.out_features))
            n = num_bases(rank, small)
            ours_A, ours_B = basis.tensors(CPU, torch.float32)
            theirs_A = A[:, :n, :small].float().squeeze(1)  # as PEFT's get_scaled_bases cuts them
            theirs_B = B[:large, :n, :].float().flatten(1)
            assert torch.equal(ours_A[:, :small], theirs_A)
            assert torch.equal(ours_B[:large, : n * rank], theirs_B)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "shapes", [[(96, 160)], [(161, 96), (96, 161)], [(300, 70), (70, 70), (33, 250)]], ids=["wide", "both", "mixed"]
    )
    def test_whole_bases_of_larger_models(self, shapes, kind):
        theirs = peft_model(shapes, 12, 77, kind)
        basis = get_basis(spec_for_layers(shapes, 12, 77, kind).whole())
        A, B = basis.projections()
        assert torch.equal(A, theirs.randlora_A["default"])
        assert torch.equal(B, theirs.randlora_B["default"])
        assert basis.same_numbers(theirs.randlora_A["default"], theirs.randlora_B["default"])

    @pytest.mark.parametrize("sparsity", [None, 3.0])
    def test_finite_where_the_std_is_no_divisor(self, sparsity):
        A, B = get_basis(spec_of(1, 1, 1, key=3, sparsity=sparsity)).projections()
        assert A.isfinite().all()
        assert B.isfinite().all()

    def test_only_the_lowest_32_bits_of_a_key_count_for_peft(self):
        A = [peft_model([(9, 7)], 3, key, "dense").randlora_A["default"] for key in (5, 5 + 2**32, 5 - 2**32)]
        assert torch.equal(A[0], A[1])
        assert torch.equal(A[0], A[2])


# Numbers (values as float32) and fingerprint (compact form). A change here is a change of what adapters mean.
GOLDEN = {
    spec_of(4, 10, 14, key=7): (
        "c2e59c1450e05e883303ac1b2de025a29695a8b4c549f08840a00537d8fe80fa",
        "71650db9c2cc81bfaec4bf1e887f1df9538cfea1ea858d7a785a96af32d52a53",
    ),
    spec_of(32, 64, 100): (
        "7dd664e438d94bde4676f4936e4fc9ed56609cf3ade20c83423bea5138e2d3fd",
        "e29507021a8fa609ea86932ba06d47a65375063ca4df0acb2b9d5bfa7ec4666d",
    ),
    spec_of(5, 33, 47, key=2**32 - 1, used=(20, 40)): (
        "fe40b03dcafc87dbe0972f5603a7de983cf1fe9e5032f6d796dc7d6ca17028a2",
        "eb76d8e1642f9a3db05ff5d454b1fa83ea0791f53dafaa013558876739b737c8",
    ),
    spec_of(16, 9, 12, key=3): (
        "59b827a9772402dbdfdeb154d78a1ee3d29052e39431148a518c824094a49003",
        "2b6b6ef499731523d667e4163a0a77bc7ff5de36164469bbf7281625aeb6a28a",
    ),
    spec_of(4, 10, 14, key=7, sparsity=3.0): (
        "c165261f4c5f9e23d3eb00ccaaf08bdfd7e4d8a564d97f1e754d393a54b0ed59",
        "3d8ea2e710158ea1c83a7a0b7031b0e1228b6e336aa2760a2588aadfa800b83d",
    ),
    spec_of(32, 64, 100, key=1, sparsity=math.sqrt(64)): (
        "9bbdc162319d725ca4cf3a65d163808ed5d7e3218afb3343fc016f52e8c8869a",
        "2487dc38186c7fbaa8a840fea6f66534a58ffaf81667592ead2259d6aca606b1",
    ),
    spec_of(8, 48, 64, key=5, sparsity=math.sqrt(48) / 2): (
        "86958124c93197d20f23aa3290f54fb3c4ad557d6f1871bd94c487e7f00c1c89",
        "a29880042d3b103e91d50a216784ebcaad190a8b60e49f363e245cb68fab6dbe",
    ),
    spec_of(5, 33, 47, key=11, sparsity=3.0, used=(20, 40)): (
        "eb73d4df548f47351824c11b191fb24b1ed9c3ea00e25ff942aa0f1484fe1ab0",
        "01af82e1b344d4a06780cb0365eb1db1bab7c66bb9411858c6e642011f926d20",
    ),
}


def golden_digest(spec: BasisSpec) -> str:
    """SHA-256 of the values as float32, little-endian, so that storage is free to change and numbers are not."""
    digest = hashlib.sha256()
    for tensor in get_basis(spec).projections():
        digest.update(np.ascontiguousarray(tensor.float().numpy()).astype("<f4").tobytes())
    return digest.hexdigest()


PRINT_FINGERPRINTS = """
import sys, torch
from randlora.ops.bases import BasisSpec, Dense, Ternary, get_basis
torch.manual_seed(99)
torch.set_default_dtype(torch.float64)
for spec in eval(sys.argv[1]):
    print(get_basis(spec).fingerprint)
"""


class TestDefinition:
    @pytest.mark.parametrize("spec", GOLDEN, ids=str)
    def test_golden_numbers(self, spec):
        assert (golden_digest(spec), get_basis(spec).fingerprint) == GOLDEN[spec]

    def test_a_cut_basis_is_a_cut_of_the_whole(self):
        for sparsity in (None, 3.0, 5.5):
            spec = spec_of(4, 20, 30, key=8, sparsity=sparsity, used=(13, 25))
            A, B = get_basis(spec).projections()
            whole_A, whole_B = get_basis(spec.whole()).projections()
            assert A.shape == (4, 1, 13)
            assert B.shape == (25, 4, 4)
            assert torch.equal(A, whole_A[:, :, :13])
            assert torch.equal(B, whole_B[:25, :4])

    def test_long_draws_do_not_depend_on_the_chunk_size(self, monkeypatch):
        spec = spec_of(4, 20, 30, key=21, sparsity=3.0)
        expected = get_basis(spec).fingerprint
        monkeypatch.setattr("randlora.ops.bases.drawing._WORDS_PER_CHUNK", 17)
        assert get_basis(spec).fingerprint == expected

    def test_another_process_draws_the_same(self):
        specs = list(GOLDEN)
        environment = {"PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "PATH": ""}
        run = subprocess.run(
            [sys.executable, "-c", PRINT_FINGERPRINTS, repr(specs)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.split() == [GOLDEN[spec][1] for spec in specs]

    @pytest.mark.parametrize("sparsity", [None, 3.0])
    def test_keys_ranks_and_sizes_give_other_numbers(self, sparsity):
        specs = [spec_of(3, 12, 14, sparsity=sparsity), spec_of(3, 12, 14, key=1, sparsity=sparsity)]
        specs += [spec_of(4, 12, 14, sparsity=sparsity), spec_of(3, 13, 14, sparsity=sparsity)]
        specs += [spec_of(3, 12, 15, sparsity=sparsity), spec_of(3, 12, 14, sparsity=2.0)]
        assert len({get_basis(spec).fingerprint for spec in specs}) == len(specs)


def redrawn(spec: BasisSpec) -> str:
    """The fingerprint of a fresh draw."""
    basis = get_basis(spec)
    drawn, fingerprint = weakref.ref(basis), basis.fingerprint
    del basis
    assert drawn() is None, "something else keeps the basis; the next draw would not be one"
    return fingerprint


@pytest.mark.parametrize("sparsity", [None, 3.0], ids=["dense", "ternary"])
class TestIndependence:
    def test_of_thread_count(self, sparsity):
        spec = spec_of(6, 70, 90, key=31, sparsity=sparsity)
        threads = torch.get_num_threads()
        found = set()
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.add(redrawn(spec))
        finally:
            torch.set_num_threads(threads)
        assert len(found) == 1

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_of_the_default_dtype(self, sparsity, dtype):
        spec = spec_of(6, 20, 30, key=32, sparsity=sparsity)
        expected = redrawn(spec)
        with default_dtype(dtype):
            assert redrawn(spec) == expected

    def test_of_the_default_device(self, sparsity):
        spec = spec_of(6, 20, 30, key=33, sparsity=sparsity)
        expected = redrawn(spec)
        with torch.device("meta"):
            assert redrawn(spec) == expected
            A, B = get_basis(spec).projections()
        assert A.device == B.device == CPU

    def test_of_inference_mode(self, sparsity):
        spec = spec_of(6, 20, 30, key=36, sparsity=sparsity)
        with torch.inference_mode():
            basis = get_basis(spec)
            basis.operands(CPU, torch.float64, Sizes(30, 20, 4))
        first = basis.operands(CPU, torch.float64, Sizes(30, 20, 4)).A
        lam = torch.ones(first.shape, requires_grad=True)
        (lam * first).sum().backward()  # a tensor of inference mode may not be saved for backward
        assert torch.equal(lam.grad, first.to(lam.dtype))

    def test_global_generators_are_neither_read_nor_touched(self, sparsity):
        spec = spec_of(6, 20, 30, key=34, sparsity=sparsity)
        found = set()
        for seed in (1, 2):
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            before = generators()
            found.add(redrawn(spec))
            assert generators() == before
        assert len(found) == 1


class TestStorage:
    def test_dense_bases_are_kept_in_two_bytes_and_ternary_b_in_two_bits(self):
        for sparsity, nbytes in ((None, 2 * (4 * 20 + 30 * 20)), (3.0, 4 * 20 + 30 * 20 / 4)):
            basis = get_basis(spec_of(4, 20, 30, key=41, sparsity=sparsity))
            assert basis.nbytes == nbytes == basis.spec.nbytes

    def test_a_cut_basis_keeps_no_more_than_it_uses(self):
        for sparsity, nbytes in ((None, 2 * (4 * 8 + 9 * 8)), (3.0, 4 * 8 + 9 * 8 / 4)):
            basis = get_basis(spec_of(4, 20, 30, key=42, sparsity=sparsity, used=(8, 9)))
            assert basis.nbytes == nbytes == basis.spec.nbytes

    def test_files_hold_the_smallest_lossless_dtype(self):
        dense = get_basis(spec_of(4, 20, 30, key=43)).projections()
        ternary = get_basis(spec_of(4, 20, 30, key=43, sparsity=3.0)).projections()
        assert [tensor.dtype for tensor in dense] == [torch.bfloat16] * 2
        assert [tensor.dtype for tensor in ternary] == [torch.float32] * 2
        assert all(tensor.is_contiguous() for tensor in (*dense, *ternary))

    @pytest.mark.parametrize("sparsity", [None, 3.0])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_tensors_are_cast_from_the_exact_numbers(self, sparsity, dtype):
        basis = get_basis(spec_of(4, 20, 30, key=44, sparsity=sparsity))
        A, B = basis.tensors(CPU, dtype)
        assert A.shape == (4, 20)
        assert B.shape == (30, 20)
        assert A.dtype == B.dtype == dtype
        assert not A.requires_grad
        exact_A, exact_B = basis.projections()
        assert torch.equal(A, exact_A.squeeze(1).to(dtype))
        assert torch.equal(B, exact_B.flatten(1).to(dtype))

    def test_meta_tensors_have_the_shapes(self):
        A, B = get_basis(spec_of(4, 20, 30, key=45, sparsity=3.0)).tensors(torch.device("meta"), torch.float32)
        assert A.is_meta
        assert A.shape == (4, 20)
        assert B.shape == (30, 20)
        assert B.dtype == torch.float32


class TestOperands:
    """What layers multiply with: slices, made once, in the smallest form that products can read."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_dense_are_cast_once_or_not_at_all(self, monkeypatch, dtype):
        monkeypatch.setattr(bf16, "_SMALLEST", 1)
        basis = get_basis(spec_of(4, 20, 30, key=46))
        first, again = (basis.operands(CPU, dtype, Sizes(9, 12, 3)) for _ in range(2))
        assert isinstance(first, DenseBases)
        assert first.A.shape == (4, 1, 12)
        assert first.B.shape == (9, 12)
        assert first.B.data_ptr() == again.B.data_ptr()
        A, B = basis.tensors(CPU, torch.float64)
        assert torch.equal(first.A.squeeze(1).double(), A[:, :12].to(first.A.dtype).double())
        assert torch.equal(first.B.double(), B[:9, :12].to(first.B.dtype).double() * unit(first.B.dtype))
        exact = dtype == torch.bfloat16 or (dtype == torch.float32 and bf16.available)
        assert basis.nbytes == 680 * (2 if exact else 2 + dtype.itemsize)

    @pytest.mark.parametrize("available", [True, False])
    def test_float32_products_read_bfloat16_where_the_machine_can(self, monkeypatch, available):
        monkeypatch.setattr(bf16, "available", available)
        monkeypatch.setattr(bf16, "_SMALLEST", 600)
        basis = get_basis(spec_of(4, 20, 30, key=47))
        assert basis.operands(CPU, torch.float32, Sizes(30, 20, 5)).B.dtype == (
            torch.bfloat16 if available else torch.float32
        )
        monkeypatch.setattr(bf16, "_SMALLEST", 601)
        assert basis.operands(CPU, torch.float32, Sizes(30, 20, 5)).B.dtype == torch.float32

    def test_codes_stay_codes(self):
        basis = get_basis(spec_of(4, 20, 30, key=48, sparsity=3.0))
        bases = basis.operands(CPU, torch.float32, Sizes(30, 20, 5))
        assert (bases.A.dtype, bases.B.dtype) == (torch.int8, torch.uint8)
        assert basis.nbytes == 4 * 20 + 30 * 20 / 4
        A, B = basis.tensors(CPU, torch.float64)
        found = basis.factor * bases._replace(dtype=torch.float64).ready().B @ bases.A.squeeze(1).double().repeat(5, 1)
        torch.testing.assert_close(found, B @ A.repeat(5, 1))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_very_sparse_are_compressed(self, dtype):
        basis = get_basis(spec_of(4, 20, 30, key=49, sparsity=40.0))
        bases, again = (basis.operands(CPU, dtype, Sizes(9, 12, 3), tokens=1) for _ in range(2))
        assert isinstance(bases, SparseBases)
        assert again.B is bases.B
        assert bases.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        A, B = basis.tensors(CPU, torch.float64)
        spread = torch.zeros(4, 12, dtype=bases.values.dtype).scatter_add(1, bases.columns, bases.values)
        identity = torch.eye(12, dtype=bases.values.dtype)
        found = bases.B.matmul(identity), bases.B.T.matmul(torch.eye(9, dtype=bases.values.dtype)).T
        torch.testing.assert_close(spread.double() * basis.stored.factors[0], A[:, :12])
        for matrix in found:
            torch.testing.assert_close(matrix.double() * basis.stored.factors[1], B[:9, :12])

    def test_on_the_meta_device(self):
        for sparsity in (None, 3.0, 40.0):
            bases = get_basis(spec_of(4, 20, 30, key=50, sparsity=sparsity)).operands(
                META, torch.float32, Sizes(9, 12, 3)
            )
            assert bases.A.is_meta
            assert bases.ready().B.shape == (9, 12)


class TestSharing:
    def test_the_same_spec_is_the_same_object(self):
        assert get_basis(spec_of(4, 20, 30, key=51)) is get_basis(spec_of(4, 20, 30, key=51))

    def test_it_is_freed_when_nothing_uses_it(self):
        basis = get_basis(spec_of(4, 20, 30, key=52))
        A, B = basis.operands(CPU, torch.float64, Sizes(30, 20, 5)).tensors()
        kept = [weakref.ref(basis), weakref.ref(A._base), weakref.ref(B._base)]
        del basis, A, B
        gc.collect()
        assert [ref() for ref in kept] == [None] * 3

    @pytest.mark.parametrize("sparsity", [None, 3.0])
    def test_copies_are_the_same_object(self, sparsity):
        basis = get_basis(spec_of(4, 20, 30, key=53, sparsity=sparsity))
        assert copy.deepcopy(basis) is basis
        assert copy.deepcopy({"x": [basis]})["x"][0] is basis

    @pytest.mark.parametrize("sparsity", [None, 3.0])
    def test_a_pickle_holds_the_definition_only(self, sparsity):
        basis = get_basis(spec_of(16, 200, 300, key=54, sparsity=sparsity))
        content = pickle.dumps(basis)
        assert len(content) < 1000
        assert pickle.loads(content) is basis
        fingerprint = basis.fingerprint
        del basis
        assert pickle.loads(content).fingerprint == fingerprint

    def test_bases_of_a_file_are_shared_and_pickled_with_their_numbers(self):
        A, B = torch.randn(3, 1, 7), torch.randn(9, 3, 3)
        basis = basis_from_projections(A, B)
        assert basis_from_projections(A.clone(), B.clone()) is basis
        content = pickle.dumps(basis)
        assert pickle.loads(content) is basis
        del basis
        again = pickle.loads(content).projections()
        assert torch.equal(again[0], A)
        assert torch.equal(again[1], B)


class TestFromProjections:
    def test_bf16_exact_numbers_are_kept_in_bf16(self):
        A, B = torch.randn(3, 1, 7).bfloat16().float(), torch.randn(9, 3, 3).bfloat16().float()
        basis = basis_from_projections(A, B)
        assert {tensor.dtype for tensor in basis.projections()} == {torch.bfloat16}
        assert basis.same_numbers(A, B)

    def test_fp16_exact_numbers_are_kept_in_fp16(self):
        A, B = torch.randn(3, 1, 7).half().float(), torch.randn(9, 3, 3).half().float()
        basis = basis_from_projections(A, B)
        assert {tensor.dtype for tensor in basis.projections()} == {torch.float16}
        assert basis.same_numbers(A, B)

    def test_other_numbers_are_kept_as_they_are(self):
        A, B = torch.randn(3, 1, 7), torch.randn(9, 3, 3)
        kept_A, kept_B = basis_from_projections(A, B).projections()
        assert kept_A.dtype == kept_B.dtype == torch.float32
        assert torch.equal(kept_A, A)
        assert torch.equal(kept_B, B)

    def test_one_number_that_is_not_bf16_keeps_both_wide(self):
        A, B = torch.randn(3, 1, 7).bfloat16().float(), torch.randn(9, 3, 3).bfloat16().float()
        B[4, 1, 2] = 1 + 2**-20
        basis = basis_from_projections(A, B)
        assert basis.same_numbers(A, B)

    def test_they_do_not_alias_the_file(self):
        A, B = torch.randn(3, 1, 7), torch.randn(9, 3, 3)
        basis = basis_from_projections(A, B)
        expected = basis.projections()[0].clone()
        A.zero_()
        assert torch.equal(basis.projections()[0], expected)

    @pytest.mark.parametrize(
        ("A", "B"),
        [
            (torch.randn(3, 7), torch.randn(9, 3, 3)),
            (torch.randn(3, 1, 7), torch.randn(9, 9)),
            (torch.randn(3, 2, 7), torch.randn(9, 3, 3)),
            (torch.randn(3, 1, 7), torch.randn(9, 3, 4)),
            (torch.ones(3, 1, 7, dtype=torch.int8), torch.ones(9, 3, 3, dtype=torch.int8)),
        ],
        ids=["A-2d", "B-2d", "A-middle", "rank", "integers"],
    )
    def test_shapes_that_are_no_bases_are_refused_with_the_shapes(self, A, B):
        with pytest.raises(BasisMismatchError) as raised:
            basis_from_projections(A, B)
        assert str(tuple(A.shape)) in str(raised.value)
        assert str(tuple(B.shape)) in str(raised.value)

    @pytest.mark.parametrize("which", ["A", "B"])
    def test_nan_is_never_the_same_number(self, which):
        A, B = torch.randn(3, 1, 7), torch.randn(9, 3, 3)
        (A if which == "A" else B).view(-1)[2] = math.nan
        good = basis_from_projections(A.nan_to_num(), B.nan_to_num())
        assert not good.same_numbers(A, B)


class TestSameNumbers:
    @settings(deadline=None)
    @given(data=st.data(), sparsity=st.sampled_from([None, 3.0]))
    def test_one_changed_value_anywhere_is_seen(self, data, sparsity):
        basis = get_basis(spec_of(3, 8, 10, key=61, sparsity=sparsity))
        A, B = (tensor.float().clone() for tensor in basis.projections())
        assert basis.same_numbers(A, B)
        changed = data.draw(st.sampled_from([A, B])).view(-1)
        index = data.draw(st.integers(0, changed.numel() - 1))
        changed[index] = torch.nextafter(changed[index], torch.tensor(math.inf))
        assert not basis.same_numbers(A, B)

    def test_larger_bases_that_begin_with_them_are_the_same(self):
        cut = get_basis(spec_of(4, 20, 30, key=62, used=(13, 25)))
        whole = get_basis(cut.spec.whole())
        assert cut.same_numbers(*whole.projections())
        assert not whole.same_numbers(*cut.projections())

    def test_another_rank_is_not_the_same(self):
        basis = get_basis(spec_of(4, 20, 30, key=62))
        assert not basis.same_numbers(*get_basis(spec_of(5, 20, 30, key=62)).projections())

    def test_a_fingerprint_sees_one_changed_value_and_the_factors(self):
        A, B = torch.randn(3, 1, 7), torch.randn(9, 3, 3)
        changed = B.clone()
        changed[8, 2, 2] += 1
        assert basis_from_projections(A, B).fingerprint != basis_from_projections(A, changed).fingerprint
        codes = torch.ones(2, 3, dtype=torch.int8), torch.ones(4, 2, dtype=torch.int8)
        found = [Basis(TernaryStored(*codes, factors, Ternary(3.0))) for factors in ((1.0, 2.0), (2.0, 1.0))]
        assert found[0].fingerprint != found[1].fingerprint


class TestStatistics:
    def test_the_edges_of_the_ternary_intervals_are_zero(self):
        """Strictly below 1/(2s) and strictly above 1 - 1/(2s), as PEFT has it; with s = 2 both edges can be drawn."""
        quarter = 2**22  # of 2²⁴
        words = np.array([0, quarter - 1, quarter, 3 * quarter, 3 * quarter + 1, 2**24 - 1], np.uint32)
        assert ternary._codes(words, 2.0).tolist() == [-1, -1, 0, 0, 1, 1]

    @pytest.mark.parametrize("sparsity", [1.0, 1.5, 3.0, math.sqrt(1024), 100.0])
    def test_density_of_ternary_bases(self, sparsity):
        codes = torch.sign(get_basis(spec_of(32, 1024, 512, key=71, sparsity=sparsity)).projections()[1])
        expected = 1 / (2 * sparsity)
        tolerance = 5 * math.sqrt(expected * (1 - expected) / codes.numel())  # five standard errors
        for sign in (-1, 1):
            assert abs((codes == sign).double().mean().item() - expected) <= tolerance

    @pytest.mark.parametrize("sparsity", [None, 3.0, 32.0])
    def test_unit_standard_deviation_and_no_mean(self, sparsity):
        for tensor in get_basis(spec_of(32, 256, 320, key=72, sparsity=sparsity)).projections():
            values = tensor.double()
            assert values.std().item() == pytest.approx(1, abs=0.01)
            assert abs(values.mean().item()) < 5 / math.sqrt(values.numel())

    def test_dense_values_are_uniform(self):
        values = get_basis(spec_of(32, 256, 320, key=73)).projections()[1].double()
        assert values.abs().max().item() == pytest.approx(math.sqrt(3), abs=0.02)
        assert (values.abs() < math.sqrt(3) / 2).double().mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("rank", "min_dim", "expected"), [(4, 8, 2), (4, 9, 3), (4, 1, 1), (64, 5, 1), (1, 7, 7)])
def test_number_of_bases_makes_the_update_full_rank(rank, min_dim, expected):
    assert num_bases(rank, min_dim) == expected
    assert rank * expected >= min_dim


@pytest.mark.parametrize("kind", ["drawn", "ternary", "float32 of a file"])
def test_writing_into_what_is_given_out_changes_no_basis(kind):
    if kind == "float32 of a file":
        basis = basis_from_projections(torch.randn(4, 1, 20), torch.randn(30, 5, 4))
    else:
        basis = get_basis(spec_of(4, 20, 30, key=46, sparsity=3.0 if kind == "ternary" else None))
    before, fingerprint = [t.clone() for t in basis.projections()], basis.fingerprint
    dtype = torch.bfloat16 if kind == "drawn" else torch.float32
    for tensor in (*basis.projections(), *basis.tensors(CPU, dtype), *basis.tensors(CPU, torch.float64)):
        tensor.data.mul_(2)
    assert all(map(torch.equal, basis.projections(), before))
    assert Basis(basis.stored).fingerprint == fingerprint  # computed anew
