"""What training stages add to TRL's trainers: checkpoints that are whole or absent, and a loss that a CPU can afford.

Importing this module loads torch; the scripts do so after their arguments are checked.
"""

import ctypes
import functools
import os
import shutil
import signal
import threading
import types
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from datasets import Dataset, concatenate_datasets
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Sampler
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from stoney_rl import checkpoints, models, runs
from stoney_rl.corpus import SPLIT_FILE
from stoney_rl.errors import Preempted, StoneyError

# transformers 5.23 renamed gradient to activation checkpointing; TRL 1.16 and PEFT still set the old name themselves.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)

# Answer tokens whose logits are held at once: 512 x 49,152 fp32 logits are 100 MB.
HEAD_CHUNK = 512
# How torch.save, which raises no OSError, says that it could not write.
_TORCH_WRITERS = ("inline_container", "PytorchStreamWriter")
# Config fields by which an architecture changes its logits after the LM head (Gemma 2, Cohere, Granite, Falcon-H1).
_SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class WholeCheckpoints:
    """Mixin for TRL's trainers: ``checkpoint-<step>`` appears when it is complete, by a rename.

    transformers writes into the final directory file by file, so a kill in between leaves a directory that looks like
    a checkpoint and cannot be resumed from.
    """

    _SAVING = ".saving"

    def _get_output_dir(self, trial: object) -> str:
        return str(Path(self.args.output_dir) / self._SAVING) if self._is_saving else super()._get_output_dir(trial)

    _is_saving = False

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        root = Path(self.args.output_dir)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(root / self._SAVING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        # TRL 1.16 counts tokens from 0 again after a resume, but for GRPO, which counts them in the state itself.
        self.state.num_input_tokens_seen = max(self.state.num_input_tokens_seen, self._total_train_tokens)
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            self._gather_rng_states(root / self._SAVING / name)
        except (OSError, SafetensorError, RuntimeError) as error:
            if type(error) is RuntimeError and not any(writer in str(error) for writer in _TORCH_WRITERS):
                raise
            free = shutil.disk_usage(root).free / 2**20
            shutil.rmtree(root / self._SAVING, ignore_errors=True)
            raise StoneyError(
                f"{root}: checkpoint {self.state.global_step} can't be written ({' '.join(str(error).split())}; {free:,.0f} "
                "MiB free); make room, then go on with --resume"
            ) from error
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(root / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if self.args.should_save:
            self.state.save_to_json(str(root / self._SAVING / name / "trainer_state.json"))
            shutil.rmtree(root / name, ignore_errors=True)
            os.rename(root / self._SAVING / name, root / name)
            shutil.rmtree(root / self._SAVING)
            self._rotate(root)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero():  # of a node that keeps no checkpoints and has a disk of its own
            shutil.rmtree(root / self._SAVING, ignore_errors=True)

    def _gather_rng_states(self, directory: Path) -> None:
        """Every process's random state in the checkpoint, also of those whose node does not share its disk."""
        if self.args.world_size == 1:
            return
        own = directory / f"rng_state_{self.args.process_index}.pth"
        for name, content in gather_object([(own.name, own.read_bytes())]):
            if self.args.should_save and not (directory / name).exists():
                (directory / name).write_bytes(content)

    def train(self, *args: object, **kwargs: object) -> TrainOutput:
        """As ``Trainer.train``. Raises ``Preempted`` when a SIGTERM has made it save and stop early."""
        root = Path(self.args.output_dir)
        if self.is_local_process_zero():  # what a kill left: half a save, half a deletion, half an arrival
            for stale in (*root.glob(".old-*"), *root.glob(".arriving-*"), root / self._SAVING):
                shutil.rmtree(stale, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        stop = _SaveAndStop(self.steps_between_resumable)
        self.add_callback(stop)
        output = super().train(*args, **kwargs)
        if stop.agreed(self.args):
            raise Preempted(f"stopped by a signal, saved in {root}/checkpoint-{self.state.global_step}; "
                            "the same command with --resume goes on")  # fmt: skip
        return output

    # A checkpoint between two of these steps could not be resumed from exactly.
    steps_between_resumable = 1

    def _init_training_state(self, *args: object, **kwargs: object) -> tuple[int, int]:
        position = super()._init_training_state(*args, **kwargs)
        self._total_train_tokens = self.state.num_input_tokens_seen
        return position

    def _run_epoch(self, *args: object, **kwargs: object) -> None:
        # transformers trains one step too many when it resumes from a checkpoint at which training had ended.
        saved = self.state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
        if saved.get("should_training_stop"):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _rotate(self, root: Path) -> None:
        limit = self.args.save_total_limit
        if not limit:
            return
        steps = sorted(runs.step_of(path) for path in root.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
        keep = set(steps[-limit:])
        if self.state.best_global_step:
            keep.add(self.state.best_global_step)
        for step in steps:
            if step not in keep:  # a deletion that is cut short leaves no half checkpoint: rename first
                doomed = root / f".old-{step}"
                os.rename(root / f"{PREFIX_CHECKPOINT_DIR}-{step}", doomed)
                shutil.rmtree(doomed, ignore_errors=True)


class _SaveAndStop(TrainerCallback):
    """On SIGTERM or SIGHUP (spot instances, a lost terminal): every process finishes its step, saves and stops.

    The processes agree in every step, as the signal does not reach them all in the same one.
    """

    def __init__(self, every: int) -> None:
        self.every, self.requested, self.handlers = every, False, {}

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self.handlers[number] = signal.signal(number, self._request)

    def _request(self, *_: object) -> None:
        self.requested = True

    def agreed(self, args: object) -> bool:
        """Whether any process was asked to stop; all must ask together."""
        if args.world_size > 1:
            self.requested = bool(reduce(torch.tensor(float(self.requested), device=args.device), "sum"))
        return self.requested

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if self.agreed(args) and state.global_step % self.every == 0:
            control.should_save = True

    def on_save(self, args: object, state: object, control: object, **kwargs: object) -> None:
        # Not before: a checkpoint that says 'stop' is one at which training had ended.
        if self.requested and state.global_step % self.every == 0:
            control.should_training_stop = True

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class AnswerTrainer(WholeCheckpoints, SFTTrainer):
    """TRL's ``SFTTrainer`` with whole checkpoints, exact resumption and, on a CPU, an LM head for trained tokens only.

    An update is made of the same rows on any number of processes, and the held-out loss is the mean over all answer
    tokens, however they are batched.
    """

    def __init__(
        self, *, args: SFTConfig, train_dataset: Dataset, eval_dataset: Dataset | None = None, **kwargs: object
    ) -> None:
        self.num_rows = len(train_dataset)
        if args.world_size > 1:
            train_dataset = _with_blanks(train_dataset, 1)
        if eval_dataset is not None:
            if args.world_size > 1:
                eval_dataset = _with_blanks(eval_dataset, -len(eval_dataset) % (args.eval_batch_size * args.world_size))
            self.answer_tokens_a_row = sum(
                label != -100 for labels in eval_dataset["labels"] for label in labels[1:]
            ) / len(eval_dataset)
        super().__init__(args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        model = self.model
        while not isinstance(model, PreTrainedModel):
            model = model.get_base_model()
        if model.device.type == "cpu":
            _score_answers_only(model)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return _Order(self, train_dataset or self.train_dataset)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: object = None
    ) -> torch.Tensor:
        if not self.model.training:
            # Trainer averages the losses of batches, each weighted by its rows; so each is made a share of the whole.
            num_items_in_batch = len(inputs["input_ids"]) * self.answer_tokens_a_row * self.accelerator.num_processes
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def _with_blanks(rows: Dataset, number: int) -> Dataset:
    """``rows`` and ``number`` more that teach nothing: one token without a label."""
    if not number:
        return rows
    blank = {name: [values[0]] for name, values in rows[0].items()} | {"labels": [-100]}
    return concatenate_datasets([rows, Dataset.from_list([blank] * number, features=rows.features)])


class _Order(Sampler):
    """Row numbers of an epoch, in an order that follows from the seed and the epoch alone.

    With ``group_by_length`` rows of like length come together; 'sequential' keeps the data's order. Of several processes each takes every so-manieth batch;
    where the last update has too few rows for all of them, the blank row at the end of the data fills it up.

    transformers' own samplers draw from the global generator: a run that resumes inside an epoch can't draw the order
    that the epoch began with.
    """

    def __init__(self, trainer: AnswerTrainer, rows: Dataset) -> None:
        self.trainer, self.blank = trainer, trainer.num_rows
        args = trainer.args
        self.lengths = [len(ids) for ids in rows["input_ids"]][: trainer.num_rows]
        self.rows_an_update = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.num_blanks = -len(self.lengths) % self.rows_an_update if args.world_size > 1 else 0

    def __len__(self) -> int:
        return len(self.lengths) + self.num_blanks

    def __iter__(self) -> Iterator[int]:
        args, epoch = self.trainer.args, int(self.trainer.state.epoch or 0)
        generator = torch.Generator().manual_seed((args.seed if args.data_seed is None else args.data_seed) + epoch)
        if args.train_sampling_strategy == "group_by_length":
            order = get_length_grouped_indices(self.lengths, self.rows_an_update, generator=generator)
        elif args.train_sampling_strategy == "random":
            order = torch.randperm(len(self.lengths), generator=generator).tolist()
        else:
            order = list(range(len(self.lengths)))
        return iter(order + [self.blank] * self.num_blanks)


def _score_answers_only(model: PreTrainedModel) -> None:
    """Replace the CPU path of TRL's fused LM head, in place.

    Without Triton, TRL 1.16 projects every position through the vocabulary, prompt tokens too, in small tiles, and
    twice. On a CPU that is the larger part of a step. Here only positions with a label are projected, once. Same
    outputs, same loss; architectures that rescale their logits keep TRL's path.
    """
    if rescales_logits(model.config.get_text_config()):
        return
    trl_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, num_items_in_batch=None, **kwargs):
        if not fused_lm_head or labels is None:
            return trl_forward(
                *args, fused_lm_head=fused_lm_head, labels=labels, num_items_in_batch=num_items_in_batch, **kwargs
            )
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        return_free_pages()
        targets = labels[:, 1:]
        trained = targets != -100
        scores = score_tokens(self.get_output_embeddings(), hidden[trained], targets[trained])
        log_probs, entropy, is_top1 = (_scatter(values, trained) for values in scores)
        count = trained.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / count,
            log_probs=log_probs,
            entropy=entropy,
            is_top1=is_top1,
            label_mask=trained,
        )

    model.forward = types.MethodType(forward, model)


def return_free_pages() -> None:
    """Give the pages of freed blocks back to the system, where the C library can (glibc; elsewhere it does nothing).

    The layers leave holes between what they keep, in which the logits don't fit: without this a step's peak is up to
    twice what it uses. It takes a few hundredths of a second.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def rescales_logits(config: PretrainedConfig) -> bool:
    """Whether a model with this text config changes its logits after the LM head, or adds a loss of its routers."""
    scaled = any(getattr(config, name, None) not in (None, 1, 1.0) for name in _SCALED_LOGITS)
    return scaled or bool(getattr(config, "output_router_logits", False))


def score_tokens(
    head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability, entropy (nats) and top-1 hit of ``targets`` [tokens] given ``hidden`` [tokens, width].

    The logits are divided by ``temperature``. More than ``HEAD_CHUNK`` tokens are projected chunk by chunk, and again in
    the backward pass: large batches stay within one chunk's memory.
    """
    score = functools.partial(_score, temperature=temperature)
    if len(hidden) > HEAD_CHUNK:
        score = functools.partial(checkpoint, score, use_reentrant=False)
    chunks = zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
    parts = [score(head, states, tokens) for states, tokens in chunks]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _score(
    head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    log_probs = functional.log_softmax(head(hidden).float() / temperature, dim=-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        is_top1 = log_probs.argmax(-1) == targets
    return log_probs.gather(-1, targets[:, None]).squeeze(-1), entropy, is_top1


def _scatter(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[masked positions] -> [batch, sequence], zero elsewhere; keeps the graph when no position is masked in."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


class _QuietProgress(ProgressCallback):
    """transformers' progress bar with the latest loss behind it, instead of a printed dictionary for each record."""

    def on_log(self, args: object, state: object, control: object, logs: dict | None = None, **kwargs: object) -> None:
        if self.training_bar is not None and logs:
            shown = {"loss": "loss", "eval_loss": "held-out loss", "reward": "reward"}
            self.shown |= {shown[key]: f"{float(logs[key]):.3f}" for key in shown if key in logs}
            self.training_bar.set_postfix(self.shown)

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self.shown: dict[str, str] = {}
        super().on_train_begin(*args, **kwargs)


def quiet_progress(trainer: Trainer) -> None:
    """Replace the trainer's printing callbacks by one progress bar."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_QuietProgress)


def target_modules(model: PreTrainedModel, names: list[str]) -> str | list[str]:
    """``--lora_target_modules`` as PEFT takes it. Raises ``StoneyError`` for a name that no linear layer ends in."""
    if names == ["all-linear"]:
        return "all-linear"
    linear = {name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if hasattr(layer, "in_features")}
    linear = sorted(
        linear - {"lm_head"}
    )  # TRL scores the head's weights by themselves: an adapter there would not train
    unknown = [name for name in names if name.rsplit(".", 1)[-1] not in linear]
    if unknown:
        raise StoneyError(
            f"--lora_target_modules {' '.join(unknown)}: the model has {', '.join(linear)}, or all-linear"
        )
    return names


def adapter_moved(model: PeftModel) -> bool:
    """Whether training changed what the adapter computes: LoRA's B matrices are 0 at the start."""
    return any("lora_B" in name and bool(weight.any()) for name, weight in model.named_parameters())


def gathered_weights(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """The weights of a sharded model, gathered: every process must call this. None if the model is whole as it is."""
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    return trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None


def check_saved_adapter(model: PeftModel, directory: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Raise ``StoneyError`` unless the adapter file in ``directory`` holds exactly ``model``'s adapter, bit for bit.

    ``weights``: those of a sharded model (``gathered_weights``).
    """
    saved = load_file(directory / "adapter_model.safetensors")
    trained = get_peft_model_state_dict(model, state_dict=weights)
    differing = [name for name in trained if name not in saved or not torch.equal(saved[name], trained[name].cpu())]
    if differing or saved.keys() != trained.keys():
        raise StoneyError(
            f"{directory}: {len(differing)} saved tensors differ from the trained ones; is the disk full?"
        )


def merged(source: models.ModelSource, directory: Path) -> models.ModelSource:
    """``source`` as a model without an adapter: itself, or the merged model that was saved with the adapter.

    An adapter that comes alone is merged in fp32 into ``directory``. Raises ``StoneyError`` if something else is there.
    """
    if source.kind != "adapter":
        return source
    stage = checkpoints.read_stage(Path(source.name)) or {}
    beside = checkpoints.locate(stage.get("arguments", {}).get("merged_dir") or str(directory), Path(source.name))
    for path in (Path(beside), directory):
        found = (checkpoints.read_stage(path) or {}) if path.is_dir() else {}
        if (
            found.get("adapter")
            and Path(checkpoints.locate(found["adapter"], path)).resolve() == Path(source.name).resolve()
        ):
            print(f"{source.name}: an adapter; starting from its merged model, {path}")
            return models.find_model(str(path))
    if directory.exists() and (checkpoints.read_stage(directory) or {}).get("stage") != "merge":
        raise StoneyError(f"{directory}: in the way of the merged model of {source.name}; rename it, or merge yourself")
    with PartialState().main_process_first():
        if not PartialState().is_main_process:
            return models.find_model(str(directory))
        model = models.load_model(source, torch.float32)
        checkpoints.check_fingerprint(Path(source.name), model)
        model = model.merge_and_unload()
        with checkpoints.staged(directory, overwrite=True) as work:
            model.save_pretrained(work)
            models.load_tokenizer(source).save_pretrained(work)
            if (Path(source.name) / SPLIT_FILE).exists():
                shutil.copy(Path(source.name) / SPLIT_FILE, work / SPLIT_FILE)
            written = {"kind": "merged", "adapter": source.name, "fingerprint": checkpoints.fingerprint(model)}
            inherited = {"stage": "merge", "parent": {"path": source.name, "fingerprint": stage.get("fingerprint")}}
            checkpoints.write_json(work / checkpoints.STAGE_FILE, stage | inherited | written)
    print(f"{source.name}: an adapter alone; merged in fp32 into {directory}")
    return models.find_model(str(directory))


def record_adapter(adapter: Path, stage: dict) -> PeftModel:
    """Write the ``stage.json`` of ``adapter``, with what it computes on its base in fp32; return it, so loaded."""
    model = models.load_model(models.find_model(str(adapter)), torch.float32)
    checkpoints.write_json(
        adapter / checkpoints.STAGE_FILE, stage | {"kind": "adapter", "fingerprint": checkpoints.fingerprint(model)}
    )
    return model


def save_merged(adapter: Path, merged: Path, stage: dict, *, dtype: torch.dtype, also: Iterable[Path] = ()) -> float:
    """Merge ``adapter`` into its base in fp32 and write both directories' ``stage.json``; publish ``merged``.

    The files ``also`` are copied into ``merged``.

    Returns the largest absolute difference between the logits of the adapter on its base and of the merged model, both
    in fp32, relative to the largest logit if that is above 1. Raises ``StoneyError`` above
    ``checkpoints.LOGIT_TOLERANCE``, or if the files hold another model than the one in memory.
    """
    model = record_adapter(adapter, stage)
    tokenizer = models.load_tokenizer(models.find_model(str(adapter)))
    logits = checkpoints.probe_logits(model)
    model = model.merge_and_unload()
    scale = logits.abs().max().clamp(min=1)
    difference = float((checkpoints.probe_logits(model) - logits).abs().max() / scale)
    del logits
    if difference > checkpoints.LOGIT_TOLERANCE:
        raise StoneyError(
            f"{merged}: logits differ from the adapter's by {difference:.2g} after merging; please report this model"
        )
    for weight in model.parameters():  # not model.to(): that would round the rotary frequencies, which loading does not
        weight.data = weight.data.to(dtype)
    with checkpoints.staged(merged, overwrite=True) as work:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        for file in (adapter / SPLIT_FILE, *also):
            shutil.copy(file, work / file.name)
        fingerprint = checkpoints.fingerprint(model)
        del model  # one copy of the weights at a time
        reloaded = models.load_model(models.find_model(str(work)), dtype)
        if checkpoints.fingerprint(reloaded) != fingerprint:
            raise StoneyError(
                f"{merged}: the saved weights compute other logits than the merged model; is the disk full?"
            )
        checkpoints.write_json(
            work / checkpoints.STAGE_FILE,
            stage | {"kind": "merged", "adapter": str(adapter).removesuffix(".partial"), "fingerprint": fingerprint},
        )
    return difference
