"""What a run will do: the plan of a step and its memory by hand."""

import pytest
import tiny

from stoney_rl.errors import StoneyError
from stoney_rl.memory import expected_memory
from stoney_rl.preflight import BatchPlan, Sampled, plan_batch


@pytest.mark.parametrize(
    ("given", "plan"),
    [
        ((64, 16), BatchPlan(prompts=4, per_device=16, accumulation=4)),  # the named command
        ((64, 16, 4), BatchPlan(4, 16, 1)),
        ((64, 16, 8), BatchPlan(4, 8, 1)),  # a group is spread over two devices
        ((64, 16, 1, 64), BatchPlan(4, 64, 1)),
        ((64, 16, 1, 1), BatchPlan(4, 1, 64)),
        ((48, 24), BatchPlan(2, 12, 4)),  # half a group: 16 would cut one unevenly
        ((64, 64), BatchPlan(1, 16, 4)),
        ((6, 3), BatchPlan(2, 6, 1)),
        ((2, 2), BatchPlan(1, 2, 1)),
        ((14, 7, 2), BatchPlan(2, 7, 1)),
        ((34, 17), BatchPlan(2, 17, 2)),  # a group without a good divisor is taken whole
        ((36, 6, 4), BatchPlan(6, 3, 3)),
    ],
)
def test_a_plan(given, plan):
    assert plan_batch(*given) == plan
    devices = given[2] if len(given) > 2 else 1
    assert plan.per_device * plan.accumulation * devices == given[0] == plan.prompts * given[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((60, 16), "must be a multiple of --group_size 16; nearest: --batch_size 48 or 64, or --group_size 12 or 15"),
        ((8, 16), "must be a multiple of --group_size 16; nearest: --batch_size 16, or --group_size 4 or 8"),
        ((7, 4), "must be a multiple of --group_size 4; nearest: --batch_size 4 or 8, or --group_size 7"),
        ((1, 4), "must be a multiple of --group_size 4; nearest: --batch_size 4"),
        ((32, 16, 3), "a multiple of --group_size 16 and of 3 devices; nearest: --batch_size 48"),
        ((60, 16, 4), "and of 4 devices; nearest: --batch_size 48 or 64, or --group_size 12 or 15"),
        ((24, 6, 16), "and of 16 devices; nearest: --batch_size 48"),
    ],
)
def test_an_impossible_batch_names_the_nearest_that_work(given, said):
    with pytest.raises(StoneyError) as error:
        plan_batch(*given)
    message = str(error.value)
    assert message.startswith(f"--batch_size {given[0]}: completions a step") and message.endswith(said)
    batch_sizes, _, group_sizes = message.partition("nearest: --batch_size ")[2].partition(", or --group_size ")
    for size in batch_sizes.split(" or "):
        plan_batch(int(size), *given[1:])
    for size in filter(None, group_sizes.split(" or ")):
        plan_batch(given[0], int(size), *given[2:])


@pytest.mark.parametrize(
    ("given", "said"),
    [((64, 16, 1, 24), "does not divide the 64 completions of a device; nearest: 16 or 32"),
     ((64, 16, 4, 32), "does not divide the 16 completions of a device; nearest: 8 or 16"),
     ((6, 3, 1, 100), "does not divide the 6 completions of a device; nearest: 3 or 6")],
)  # fmt: skip
def test_an_impossible_micro_batch_names_the_nearest_that_work(given, said):
    with pytest.raises(StoneyError) as error:
        plan_batch(*given)
    assert str(error.value) == f"--micro_batch_size {given[3]}: {said}"


def test_a_group_of_one():
    with pytest.raises(StoneyError, match="--group_size 1: a group of one has nothing to compare with"):
        plan_batch(8, 1)


# Memory.


@pytest.fixture(scope="module")
def policy():
    """Width 32, two layers, MLP 64, two key-value heads of 8, vocabulary 259; one weight of 32 x 32 is trained."""
    model = tiny.model()
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    return model


def memory(policy, plan=None, **options):
    given = {"group_size": 4, "prompt_tokens": 100, "completion_tokens": 20}
    given |= {"shares_prefixes": True, "gradient_checkpointing": True} | options
    return expected_memory(policy, plan or BatchPlan(prompts=2, per_device=4, accumulation=2), **given)


def test_memory_by_hand(policy):
    found = memory(policy)
    frozen = sum(weight.numel() for weight in policy.parameters()) - 32 * 32
    assert found.weights == 4 * frozen
    assert found.adapter == 4 * 4 * 32 * 32  # weight, gradient, two moments
    cache = 8 * 120 * 2 * 2 * 2 * 8 * 4  # completions, tokens, keys and values, layers, heads, head width, bytes
    assert found.sampling == cache + 4 * 8 * 259 * 4
    tokens = 100 + 4 * 20
    assert found.learning == 2 * tokens * 32 * 4 + tokens * (16 * 32 + 6 * 64) * 4 + 3 * 80 * 259 * 4
    assert found.peak == found.weights + found.adapter + max(found.sampling, found.learning)
    assert str(found).startswith("about ") and "weights 0" in str(found)


@pytest.mark.parametrize(
    ("more", "grows", "stays"),
    [
        ({"prompt_tokens": 200}, {"sampling", "learning"}, {"weights", "adapter"}),
        ({"completion_tokens": 40}, {"sampling", "learning"}, {"weights", "adapter"}),
        ({"shares_prefixes": False}, {"learning"}, {"weights", "adapter", "sampling"}),
        ({"gradient_checkpointing": False}, {"learning"}, {"weights", "adapter", "sampling"}),
        ({"plan": BatchPlan(2, 8, 1)}, {"learning"}, {"weights", "adapter", "sampling"}),
        ({"plan": BatchPlan(4, 4, 4)}, {"sampling"}, {"weights", "adapter", "learning"}),
    ],
)
def test_memory_grows(policy, more, grows, stays):
    before, after = memory(policy), memory(policy, **more)
    assert {name for name in ("weights", "adapter", "sampling", "learning") if getattr(after, name) > getattr(before, name)} == grows  # fmt: skip
    assert all(getattr(after, name) == getattr(before, name) for name in stays)


def test_memory_grows_with_the_model(policy):
    wider, deeper = (tiny.model(**options) for options in ({"width": 64}, {"layers": 4}))
    for model in (wider, deeper):
        model.requires_grad_(False)
        found, before = memory(model), memory(policy)
        assert found.weights > before.weights and found.sampling > before.sampling and found.learning > before.learning


def test_what_was_sampled_is_told():
    found = Sampled(
        groups=4, without_spread=3, truncated=0.25, tokens=[2, 4], rewards=[0.5, 0.25], seconds=1.0, examples=[]
    )
    assert str(found) == (
        "3 of 4 groups have no spread and would teach nothing, 25% of the completions cut at the limit, "
        "3 tokens a completion (longest 4), mean reward 0.375"
    )
    nothing = Sampled(4, 4, 0.0, [1], [], 1.0, [])
    assert str(nothing).endswith("no completion could be scored")
