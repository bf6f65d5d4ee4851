"""The reward model: a language model with one number for its last token, trained to put the better answer higher.

1. Training (TRL's RewardTrainer): loss = -log sigmoid(s(prompt, chosen) - s(prompt, rejected)), the Bradley-Terry model
   (https://arxiv.org/abs/2203.02155, eq. 1); s is a linear head on the hidden state of the token that ends the answer.
2. Reward = tanh((s - mean) / scale) in [-1, 1], with mean and standard deviation of s over answers of training pairs,
   chosen and rejected alike: 0 is as good as a training answer on average, and no answer earns without limit.
3. An answer without a word earns -1 (``completions.parse``: none, a trace that is never closed, control characters), and
   so does one too long to be read whole: what is not read can't earn. None where the prompt alone is too long.

A directory is a reward model if its ``stage.json`` says so, and its weights must give the scores recorded there.

    reward = load_reward_model("stoney_reward_model")
    reward(["What is the word for gather?"], ['"tâlo".'])        # one number a text (tâlo is invented)
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stoney_rl import checkpoints, models, terminal
from stoney_rl.errors import StoneyError
from stoney_rl.metrics import intervals
from stoney_rl.rewards.completions import parse
from stoney_rl.rewards.composite import Task
from stoney_rl.text import words

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stoney_rl.rewards.preferences import Pair

STAGE = "reward"
MADE_BY = "python train_reward_model.py"
LOWEST = -1.0
BINS = 10
_NEEDED = ("config.json", "tokenizer.json", checkpoints.STAGE_FILE)


def is_reward_model(name: str | Path) -> bool:
    """Whether ``name`` is a directory whose ``stage.json`` calls it a reward model."""
    return Path(name).is_dir() and (checkpoints.read_stage(Path(name)) or {}).get("stage") == STAGE


def find_reward_model(name: str | Path) -> dict:
    """The ``stage.json`` of a reward-model directory, checked for what scoring needs; loads no weights.

    Raises ``StoneyError`` for a directory that is missing, incomplete, or something else.
    """
    path = Path(name)
    if not path.is_dir():
        unfinished = path.with_name(path.name + ".partial").is_dir()
        remedy = f"finish the run in {path}.partial with --resume" if unfinished else f"make it with: {MADE_BY}"
        raise StoneyError(f"{name}: no such reward-model directory; {remedy}")
    stage = checkpoints.read_stage(path)
    if stage is None or stage.get("stage") != STAGE:
        what = f"a checkpoint of stage '{stage.get('stage')}'" if stage else "not made by this pipeline"
        raise StoneyError(f"{name}: no reward model but {what}; make one with: {MADE_BY} --model {name}")
    missing = [file for file in _NEEDED if not (path / file).is_file()]
    if not list(path.glob("model*.safetensors")):
        missing.append("model.safetensors")
    scale = stage.get("reward") if isinstance(stage.get("reward"), dict) else {}
    numbers = [scale.get(key) for key in ("mean", "scale", "max_length")]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers) or scale["scale"] <= 0:
        missing.append("its mean and scale in stage.json")
    if not stage.get("fingerprint"):
        missing.append("its fingerprint in stage.json")
    if missing:
        raise StoneyError(f"{name}: not a complete reward model, {', '.join(missing)} missing; make it with: {MADE_BY}")
    return stage


def load_reward_model(name: str | Path, *, batch_size: int = 16) -> "RewardModel":
    """The reward model in directory ``name``, ready to score on the GPU if there is one, else on the CPU.

    Raises ``StoneyError`` as ``find_reward_model``, and if the weights score otherwise than when they were saved.
    """
    import torch

    stage = find_reward_model(name)
    source = models.ModelSource("model", str(name))
    model = load_scorer(source, torch.float32)
    checkpoints.check_fingerprint(Path(name), model)
    dtype = models.inference_dtype("auto")
    for weight in model.parameters():  # not model.to(): that would round the rotary frequencies
        weight.data = weight.data.to(dtype)
    scale = stage["reward"]
    return RewardModel(
        model.to(models.device()),
        models.load_tokenizer(source),
        mean=scale["mean"],
        scale=scale["scale"],
        max_length=scale["max_length"],
        batch_size=batch_size,
    )


@dataclass
class RewardModel:
    """(tasks or prompts, texts) -> the reward of each text, in [-1, 1]; see the module's docstring.

    A prompt is a ``Task``, a text, or chat messages; a text is a completion as it was sampled.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    mean: float = 0.0
    scale: float = 1.0
    max_length: int = 512
    batch_size: int = 16

    def __call__(self, prompts: Sequence[Task | str | list[dict]], texts: Sequence[str]) -> list[float | None]:
        if len(prompts) != len(texts):
            raise StoneyError(f"{len(prompts)} prompts but {len(texts)} texts: expected one prompt for each text")
        turns = [_turns(prompt) for prompt in prompts]
        answers = [parse(text).answer for text in texts]
        values: list[float | None] = [LOWEST] * len(texts)
        tokens = {at: self.encode(turns[at], answer) for at, answer in enumerate(answers) if words(answer)}
        readable = {at: ids for at, ids in tokens.items() if len(ids) <= self.max_length}
        for at, score in zip(readable, self.scores(list(readable.values())), strict=True):
            values[at] = self.squash(score)
        for at in tokens.keys() - readable.keys():
            if len(self.encode(turns[at], "")) > self.max_length:
                values[at] = None
        return values

    def reward_model(
        self, completions: Sequence[str | list[dict]], prompts: Sequence[str | list[dict]], **columns: object
    ) -> list[float | None]:
        """The reward with TRL's signature, under the name that its logs show."""
        return self(prompts, [text if isinstance(text, str) else text[-1]["content"] for text in completions])

    def squash(self, score: float) -> float:
        """tanh((score - mean) / scale): in [-1, 1]."""
        return math.tanh((score - self.mean) / self.scale)

    @functools.cached_property
    def _ends(self) -> set[int]:
        from stoney_rl import prompts

        return prompts.end_of_turn_ids(self.tokenizer)

    def encode(self, prompt: list[dict], answer: str) -> list[int]:
        """Token ids of the prompt, the answer, and the token that ends it: the same in training and in scoring."""
        from stoney_rl import prompts

        return prompts.encode_example(self.tokenizer, prompt, answer, self._ends)["input_ids"]

    def scores(self, sequences: Sequence[list[int]], *, progress: str | None = None) -> list[float]:
        """The raw score of each token sequence, batched by length; with a bar that says ``progress``, if given."""
        import torch
        from tqdm import tqdm

        found = [0.0] * len(sequences)
        order = sorted(range(len(sequences)), key=lambda at: len(sequences[at]))
        pad = self.tokenizer.pad_token_id
        self.model.eval()
        starts = range(0, len(order), self.batch_size)
        for start in tqdm(starts, desc=progress, unit="batch", leave=False, disable=progress is None):
            batch = order[start : start + self.batch_size]
            width = len(sequences[batch[-1]])
            ids = torch.tensor([sequences[at] + [pad] * (width - len(sequences[at])) for at in batch])
            mask = torch.tensor([[1] * len(sequences[at]) + [0] * (width - len(sequences[at])) for at in batch])
            with torch.inference_mode():
                logits = self.model(
                    input_ids=ids.to(self.model.device), attention_mask=mask.to(self.model.device), use_cache=False
                ).logits
            for at, score in zip(batch, logits[:, 0].float().tolist(), strict=True):
                found[at] = score
        return found


def _turns(prompt: Task | str | list[dict]) -> list[dict]:
    if isinstance(prompt, Task):
        prompt = prompt.columns.get("prompts", prompt.question)
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


# Training and saving.


def load_scorer(
    source: models.ModelSource, dtype: "torch.dtype", *, attn_implementation: str | None = None
) -> "PreTrainedModel":
    """A model with a head of one score, on the CPU. Of a language model the head is new and random (``set_seed`` first).

    An adapter is loaded on its base, unmerged. Raises ``StoneyError`` if there is no such model for its architecture.
    """
    from transformers import AutoModelForSequenceClassification
    from trl.trainer.reward_trainer import suppress_seqcls_warning

    name = source.base if source.kind == "adapter" else source.name
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        with suppress_seqcls_warning():
            model = AutoModelForSequenceClassification.from_pretrained(
                name, num_labels=1, dtype=dtype, revision=source.revision, **options
            )
        if source.kind == "adapter":
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, source.name)
    except Exception as error:  # safetensors, transformers, peft and torch each raise their own on a damaged file
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise StoneyError(f"{source.name}: no reward model can be made of it: {first[:300]}") from error
    return model.eval()


@functools.cache
def pair_trainer() -> type:
    """TRL's ``RewardTrainer`` with whole checkpoints and exact resumption (a function, because it loads torch)."""
    from trl import RewardTrainer

    from stoney_rl import training

    return type("PairTrainer", (training.WholeCheckpoints, RewardTrainer), {})


def save_merged(
    adapter: models.ModelSource, work: Path, tokenizer: "PreTrainedTokenizerBase"
) -> tuple["PreTrainedModel", dict, float]:
    """Merge ``adapter`` and its head in fp32 into a complete model in the directory ``work``, and load it again.

    Returns the model as loaded, its fingerprint, and the largest difference of the probe scores of the adapter on its base and
    of the merged model, relative to the largest score if that is above 1. Raises ``StoneyError`` above
    ``checkpoints.LOGIT_TOLERANCE``, and if the files hold another model than the merged one.
    """
    import torch

    model = load_scorer(adapter, torch.float32)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    scores = checkpoints.probe_logits(model)
    model = model.merge_and_unload()
    difference = float((checkpoints.probe_logits(model) - scores).abs().max() / scores.abs().max().clamp(min=1))
    if difference > checkpoints.LOGIT_TOLERANCE:
        raise StoneyError(
            f"{work}: scores differ from the adapter's by {difference:.2g} after merging; please report this model"
        )
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    fingerprint = checkpoints.fingerprint(model)
    del model  # one copy of the weights at a time
    saved = load_scorer(models.ModelSource("model", str(work)), torch.float32)
    if checkpoints.fingerprint(saved) != fingerprint:
        raise StoneyError(f"{work}: the saved weights give other scores than the merged model; is the disk full?")
    return saved, fingerprint, difference


# Measuring.


def measure(
    pairs: "Sequence[Pair]",
    chosen: Sequence[float],
    rejected: Sequence[float],
    *,
    seed: int,
    resamples: int = intervals.RESAMPLES,
) -> dict:
    """How well raw scores order ``pairs``. Shares come with 95 % intervals, resampled by lexeme, or by prompt without.

    accuracy: share of the pairs in which chosen scores higher (a tie counts half). longer, shorter: the accuracy of
    preferring the answer of more, or fewer, characters: what length alone can tell. above_length: accuracy minus the better of
    the two, on the same pairs. kinds: accuracy by kind. calibration: sigmoid(margin) is the probability that chosen is
    better; with c = max(p, 1 - p) the confidence in the side that scores higher, ece is the sum over ``BINS`` bins of c in
    [0.5, 1] of share x |accuracy - mean c| (Guo et al. 2017, https://arxiv.org/abs/1706.04599), nll the mean of -log p.
    length: Spearman correlation of score with length, and of margin with the difference in length; accuracy where the
    better answer is the longer one, and where it is the shorter. A correlation of a constant is None.
    """
    from stoney_rl.corpus import row_hash
    from stoney_rl.metrics.report import lexeme_clusters
    from stoney_rl.rewards.preferences import kinds_of

    if not pairs or not len(pairs) == len(chosen) == len(rejected):
        raise StoneyError(
            f"{len(pairs)} pairs, {len(chosen)} and {len(rejected)} scores: expected one of each, and some"
        )
    # A prompt is a word of its own here: pairs on one prompt are right or wrong together.
    clusters = lexeme_clusters([[*pair.row.lexemes, row_hash(pair.row)] for pair in pairs])
    margins = [high - low for high, low in zip(chosen, rejected, strict=True)]
    extra = [len(pair.chosen) - len(pair.rejected) for pair in pairs]
    right, longer = _wins(margins), _wins(extra)
    shorter = [1 - value for value in longer]
    options = {"seed": seed, "resamples": resamples, "bounds": (0.0, 1.0)}

    def share(values: Sequence[float], rows: Sequence[int] = range(len(pairs))) -> dict:
        labels = [clusters[row] for row in rows]
        found = intervals.mean_interval([values[row] for row in rows], clusters=labels, **options)
        return _entry(found)

    better = max((longer, shorter), key=sum)
    above = intervals.mean_difference(better, right, clusters=clusters, **options)
    lengths = [len(pair.chosen) for pair in pairs] + [len(pair.rejected) for pair in pairs]
    return {
        "n": len(pairs),
        "seed": seed,
        "resamples": resamples,
        "confidence": intervals.CONFIDENCE,
        "accuracy": share(right),
        "longer": share(longer),
        "shorter": share(shorter),
        "above_length": _entry(above) | {"conclusive": above.conclusive},
        "kinds": {
            kind: share(right, [row for row, pair in enumerate(pairs) if pair.kind == kind]) for kind in kinds_of(pairs)
        },
        "calibration": calibration(margins),
        "length": {
            "score": _spearman([*chosen, *rejected], lengths),
            "margin": _spearman(margins, extra),
            "chosen_longer": share(right, [row for row, more in enumerate(extra) if more > 0]),
            "chosen_shorter": share(right, [row for row, more in enumerate(extra) if more < 0]),
        },
    }


def _wins(margins: Sequence[float]) -> list[float]:
    return [0.5 if margin == 0 else float(margin > 0) for margin in margins]


def _entry(found: intervals.Interval | None) -> dict:
    if found is None:
        return {"value": None, "low": None, "high": None, "n": 0, "units": 0}
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n, "units": found.units}


def calibration(margins: Sequence[float]) -> dict:
    """Expected calibration error of sigmoid(margin), its bins, and the mean negative log-likelihood; see ``measure``."""
    bins = [{"low": 0.5 + at / BINS / 2, "high": 0.5 + (at + 1) / BINS / 2, "n": 0} for at in range(BINS)]
    sure, right = [0.0] * BINS, [0.0] * BINS
    for margin, won in zip(margins, _wins(margins), strict=True):
        confidence = 1 / (1 + math.exp(-min(abs(margin), 700.0)))
        at = min(BINS - 1, int((confidence - 0.5) * 2 * BINS))
        bins[at]["n"] += 1
        sure[at] += confidence
        right[at] += won
    for at, one in enumerate(bins):
        one["confidence"] = sure[at] / one["n"] if one["n"] else None
        one["accuracy"] = right[at] / one["n"] if one["n"] else None
    nll = [max(-margin, 0.0) + math.log1p(math.exp(-abs(margin))) for margin in margins]
    error = sum(abs(hits - confidence) for hits, confidence in zip(right, sure, strict=True)) / len(margins)
    return {"ece": error, "nll": sum(nll) / len(nll), "bins": bins}


def _spearman(values: Sequence[float], others: Sequence[float]) -> float | None:
    from scipy.stats import spearmanr

    if len(set(values)) < 2 or len(set(others)) < 2:
        return None
    return float(spearmanr(values, others).statistic)


GROUP_NAMES = {"unseen": "lexemes never trained on", "seen": "lexemes of training too", "all": "all test pairs"}


def summary(groups: dict[str, dict], headline: str) -> str:
    """What is printed: accuracy by group beside what length alone can tell, by kind, and how far scores can be trusted."""
    cells = [
        [GROUP_NAMES[group], str(found["n"]), *(_shown(found[key]) for key in ("accuracy", "longer", "shorter"))]
        for group, found in groups.items()
    ]
    header = ["pair accuracy on", "n", "reward model", "always longer", "always shorter"]
    lines = [*terminal.grid(header, cells, rules=len(cells)), ""]
    found = groups[headline]
    kinds = [[kind, str(entry["n"]), _shown(entry)] for kind, entry in found["kinds"].items()]
    lines += [*terminal.grid([f"kind ({GROUP_NAMES[headline]})", "n", "accuracy"], kinds, rules=len(kinds)), ""]
    above, length = found["above_length"], found["length"]
    lines.append(
        f"Above what length alone can tell: {_shown(above, sign='+')}"
        + ("." if above["conclusive"] else ": it may be chance, or too few lexemes to say.")
    )
    by_length = [f"{_shown(length[key])} (n = {length[key]['n']})" for key in ("chosen_longer", "chosen_shorter")]
    lines.append(f"Accuracy where the better answer is longer: {by_length[0]}; shorter: {by_length[1]}.")
    lines.append(
        f"Rank correlation of score and length: {_number(length['score'])}; of margin and difference in length: "
        f"{_number(length['margin'])}."
    )
    ece = found["calibration"]["ece"]
    lines.append(
        f"Calibration: sigmoid(margin) is off by {ece:.3f} on average (expected calibration error, {BINS} bins)."
    )
    lines.append(
        f"[a, b]: {100 * found['confidence']:g}% interval over the choice of test pairs ({found['resamples']:,} resamples by "
        f"lexeme or prompt, seed {found['seed']}); another training seed is not covered."
    )
    return "\n".join(lines)


def _shown(entry: dict, sign: str = "") -> str:
    if entry["value"] is None:
        return "-"
    if entry["low"] is None:
        return f"{entry['value']:{sign}.2f}"
    return f"{entry['value']:{sign}.2f} [{entry['low']:{sign}.2f}, {entry['high']:{sign}.2f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def plot(found: dict, chosen: Sequence[float], rejected: Sequence[float], path: str | Path, *, title: str) -> None:
    """One PNG: accuracy by kind with intervals, the reliability of sigmoid(margin), and the rewards of both sides."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blue, orange, grey = "#0072B2", "#E69F00", "#999999"  # Okabe and Ito, https://jfly.uni-koeln.de/color/
    height = max(4.0, 0.3 * len(found["kinds"]) + 1.5)
    figure = Figure(figsize=(14, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    kinds, reliability, rewards = figure.subplots(1, 3)

    entries = list(found["kinds"].items())[::-1]
    for at, (_, entry) in enumerate(entries):
        kinds.barh(at, entry["value"], color=blue)
        if entry["low"] is not None:
            below, above = entry["value"] - entry["low"], entry["high"] - entry["value"]
            kinds.errorbar(entry["value"], at, xerr=[[max(0, below)], [max(0, above)]], color="black", capsize=2, lw=1)
    kinds.set_yticks(range(len(entries)), [f"{kind} (n = {entry['n']})" for kind, entry in entries])
    for key, style in (("longer", "--"), ("shorter", ":")):
        kinds.axvline(found[key]["value"], color=orange, linestyle=style, label=f"always {key}")
    kinds.axvline(0.5, color=grey, lw=1, label="chance")
    kinds.set(xlim=(0, 1), xlabel="pair accuracy")
    kinds.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)

    used = [one for one in found["calibration"]["bins"] if one["n"]]
    reliability.plot([0.5, 1], [0.5, 1], color=grey, lw=1, label="calibrated")
    reliability.plot([one["confidence"] for one in used], [one["accuracy"] for one in used], "o-", color=blue)
    for one in used:
        reliability.annotate(str(one["n"]), (one["confidence"], one["accuracy"]), xytext=(4, -10),
                             textcoords="offset points", fontsize=7)  # fmt: skip
    reliability.set(xlim=(0.48, 1.02), ylim=(0, 1.05), xlabel="confidence in the higher score", ylabel="accuracy",
                    title=f"expected calibration error {found['calibration']['ece']:.3f}")  # fmt: skip
    reliability.legend(fontsize=8)

    edges = [-1 + at / 10 for at in range(21)]
    for values, colour, label in ((chosen, blue, "chosen"), (rejected, orange, "rejected")):
        rewards.hist(values, bins=edges, color=colour, alpha=0.6, label=label)
    rewards.set(xlabel="reward: tanh((score - mean) / scale)", ylabel="answers")
    rewards.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path)
