"""Every kind of layer with structured bases: the contract of each, once more."""

import torch

from . import test_conv, test_embedding, test_linear, test_parameter, test_quantized


def structured(contract):
    """The tests of a kind of layer, with adapters of structured bases."""

    class Structured(contract):
        test_delta_weight_and_scaled_bases_are_those_of_peft = None  # PEFT has no such bases

        def model(self, dtype=torch.float32, **config):
            return super().model(dtype, **({"structured": True, "groups": 2} | config))

    return Structured


TestTallLinear = structured(test_linear.TestTallLinear)
TestWideLinear = structured(test_linear.TestWideLinear)
TestSquareConv1D = structured(test_linear.TestSquareConv1D)
TestConv2dTall = structured(test_conv.TestConv2dTall)
TestConv2dGroups = structured(test_conv.TestConv2dGroups)
TestManyRows = structured(test_embedding.TestManyRows)
TestManyRowsAllLookedUp = structured(test_embedding.TestManyRowsAllLookedUp)
TestFewRows = structured(test_embedding.TestFewRows)
TestTallExperts = structured(test_parameter.TestTallExperts)
TestWideExperts = structured(test_parameter.TestWideExperts)
TestTallNf4 = structured(test_quantized.TestTallNf4)
