import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amt_ray.core.masking.random import Random
from amt_ray.core.plan import PatchPlan, plan_counts


@pytest.mark.parametrize(
    ("patches", "mask", "throw", "expected"),
    [
        (196, 0.75, 0.0, (49, 147, 0)),
        (196, 0.45, 0.40, (30, 88, 78)),
        (64, 0.45, 0.40, (10, 28, 26)),
        (49, 0.44, 0.26, (15, 21, 13)),
        (4, 0.25, 0.5, (1, 1, 2)),
    ],
)
def test_plan_counts__are_exact(patches, mask, throw, expected):
    assert tuple(plan_counts(patches, mask, throw)) == expected


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 5),
    patches=st.integers(2, 300),
    mask=st.floats(0.01, 0.99),
    throw=st.floats(0, 0.99),
)
def test_plan__is_a_partition_with_exact_counts_for_any_shape(batch, patches, mask, throw):
    masked, seen = int(patches * mask), patches - int(patches * (mask + throw))
    if masked < 1 or seen < 1:
        with pytest.raises(ValueError, match="patch"):
            Random(mask, throw).counts(patches)
        return
    plan = Random(mask, throw)(torch.ones(batch, patches)).check()
    assert plan.visible.shape == (batch, seen)
    assert plan.masked.shape == (batch, masked)
    assert plan.num_patches == patches


def test_plan__refuses_what_is_no_partition():
    index = torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match="partition range"):
        PatchPlan(visible=index, masked=index, thrown=index[:, :0]).check()
    with pytest.raises(ValueError, match="int64"):
        PatchPlan(visible=index.float(), masked=index, thrown=index)


def test_plan_counts__error_states_the_rule_and_the_values():
    with pytest.raises(ValueError, match=r"at least one visible patch, got 0.6 \+ 0.45 of 64"):
        plan_counts(64, 0.60, 0.45)
