"""bfloat16 where it is of use, float32 elsewhere, and the log says which."""

import pytest
import torch

from training import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_products_are_in_bfloat16_where_that_is_wanted_and_there(monkeypatch, wanted: bool, there: bool):
    monkeypatch.setattr(precision, "multiplies_bf16", lambda kind: there)
    with precision.autocast(wanted, CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if wanted and there else torch.float32)
    assert precision.told(wanted, CPU).startswith("bfloat16" if wanted and there else "float32")
    assert ("no instructions" in precision.told(wanted, CPU)) == (wanted and not there)
