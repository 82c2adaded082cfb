"""Dense bases keep the contract of every kind."""

from randlora.ops.bases import Dense

from .contract import KindContract


class TestDense(KindContract):
    kind = Dense()
