"""Attack a reward before anyone trains on it: what can be earned without answering?

    python probe_rewards.py
    python probe_rewards.py --dataset prepared
    python probe_rewards.py --dataset prepared --reward composite=0.8 --reward my_rewards:politeness=0.2
    python probe_rewards.py --dataset prepared --reward_model stoney_reward_model
    python probe_rewards.py --reward_weights R_dict=0.5 R_lex=0.2 --null_model checkpoints/smollm2-135m

Reads: a prepared directory (its rows and its lexicon), or rows and --lexicon; without arguments the planted sample.
Runs every attack of stoney_rl/rewards/attacks.py on the reward, beside the gold answer, a right answer in other words and
an honest miss, and policies that have learned nothing. Prints a table; --results_file writes it as JSON.
Exit codes: 0 nothing found, 1 the reward can be gamed, 2 bad input, 130 interrupted.
"""

import argparse
import sys
from pathlib import Path

from stoney_rl import artifacts, checkpoints, cli, prepared, tracking
from stoney_rl.errors import StoneyError
from stoney_rl.rewards.flags import add_reward_flags, attempt, check_reward_flags

PLANTED_ROWS, PLANTED_LEXICON = "data/planted/rows.jsonl", "data/planted/lexicon.jsonl"
EXIT_GAMED = 1


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    data = parser.add_argument_group("rows")
    data.add_argument("--dataset", help="prepared directory, file or folder of rows; default: the planted sample")
    data.add_argument("--num_samples", type=cli.positive_int, default=100, help="rows to attack, drawn by --seed")
    data.add_argument("--seed", type=cli.non_negative_int, default=0, help="of the rows and the attacks")

    add_reward_flags(parser.add_argument_group("the reward"))

    policy = parser.add_argument_group("null policy")
    policy.add_argument("--null_model", help="a checkpoint whose answers must earn less than an honest answer")
    policy.add_argument("--max_new_tokens", type=cli.positive_int, default=64, help="tokens an answer at most")
    policy.add_argument("--batch_size", type=cli.positive_int, default=16, help="prompts at a time")
    parser.add_argument("--results_file", help="file for the result as JSON")
    cli.add_tracking_flags(
        parser,
        {"dataset": artifacts.ROWS, "reward_model": artifacts.REWARD_MODELS, "null_model": artifacts.ANY_MODEL},
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = cli.parse_stage(build_parser(), argv)
    dataset, lexicon, plugins, weights = check_args(args)
    tracking.load_env()

    # 1. The rows, what is known of the language, and the reward.
    from stoney_rl.rewards import probe
    from stoney_rl.rewards.composite import Composite, Task
    from stoney_rl.rewards.knowledge import load_knowledge
    from stoney_rl.rewards.plugins import Plugin, scorer
    from stoney_rl.rewards.similarity import load_similarity

    knowledge = load_knowledge(lexicon)
    rows = read_rows(dataset)
    tasks = [Task.of(row) for row in rows]
    composite = Composite(knowledge, weights, load_similarity(args.encoder, args.comet_model))
    print(f"{dataset}: {len(rows):,} rows; {lexicon}: {len(knowledge.forms):,} forms, "
          f"{len(knowledge.segments):,} with a segmentation", flush=True)  # fmt: skip

    if args.reward_model:
        from stoney_rl.rewards.reward_model import load_reward_model

        learned = load_reward_model(args.reward_model, batch_size=args.batch_size)
        plugins.append(Plugin("reward_model", args.reward_model_weight, learned.reward_model))

    # 2. The attacks.
    policies = {}
    if args.null_model:
        chosen = set(probe.sample(tasks, args.num_samples, args.seed))
        asked = [row for row, task in zip(rows, tasks, strict=True) if task in chosen]
        policies[Path(args.null_model).name] = generate(args, asked)
    report = probe.probe(
        scorer(plugins, composite),
        tasks,
        knowledge,
        num_samples=args.num_samples,
        seed=args.seed,
        policies=policies,
        progress=lambda name: print(f"attacking: {name} ...", file=sys.stderr, flush=True),
    )
    print("\n" + probe.as_text(report))

    # 3. The result.
    if args.results_file:
        result = checkpoints.describe_stage("probe", arguments=vars(args), seed=args.seed, **report.as_dict())
        try:
            Path(args.results_file).parent.mkdir(parents=True, exist_ok=True)
            checkpoints.write_json(Path(args.results_file), result)
        except OSError as error:
            raise StoneyError(
                f"--results_file {args.results_file}: can't be written: {error.strerror}; give another file"
            ) from None
    tracker = tracking.start_stage(
        "probe_rewards",
        args,
        name=f"probe-{Path(dataset).name}",
        model=args.null_model,
        data={"source": dataset},
        also=[args.reward_model],
    )
    tracker.log({f"probe/{line['name']}": line["mean"] for line in report.lines if line["mean"] is not None})
    tracker.log({"probe/problems": len(report.problems)})
    columns = ["kind", "name", "rows", "unscored", "mean", "beats honest", "beats miss", "where"]
    tracker.table("probe", columns, [[line.get(key) for key in columns] for line in report.lines])
    tracker.finish()
    return EXIT_GAMED if report.problems else 0


def check_args(args: argparse.Namespace) -> tuple[str, str, list, dict[str, float]]:
    """Rows, lexicon, rewards and weights to use. Raises ``StoneyError`` with every problem that can be seen before
    anything is read."""
    from stoney_rl.models import find_model, resolve_unpublished

    problems = cli.Problems()
    data = attempt(problems, find_data, args)
    plugins, weights = check_reward_flags(args, problems)
    if args.null_model:
        attempt(problems, find_model, resolve_unpublished(args.null_model)[0], flag="--null_model ")
    if args.results_file is not None and (not args.results_file.strip() or Path(args.results_file).is_dir()):
        problems.add(f"--results_file {args.results_file!r}: no file; name one, such as probe.json")
    elif args.results_file and any(
        parent.exists() and not parent.is_dir() for parent in Path(args.results_file).parents
    ):
        problems.add(f"--results_file {args.results_file}: lies below a file; name one in a folder")
    problems.raise_if_any()
    return *data, plugins, weights


def find_data(args: argparse.Namespace) -> tuple[str, str]:
    """The rows and the lexicon to use. Raises ``StoneyError`` where rows come without a lexicon."""
    if args.dataset is None:
        root = Path(__file__).resolve().parent
        return str(root / PLANTED_ROWS), args.lexicon or str(root / PLANTED_LEXICON)
    if args.lexicon is None and not prepared.is_prepared(args.dataset):
        raise StoneyError(
            f"--dataset {args.dataset}: no prepared directory, so there is no lexicon: give one with --lexicon, or make both "
            f"with: python inspect_hf_dataset.py --dataset {args.dataset} --output_dir prepared"
        )
    return args.dataset, args.lexicon or args.dataset


def read_rows(dataset: str) -> list:
    """The rows to attack, with their forms: of a prepared directory its training rows. Raises ``StoneyError`` if there
    are none."""
    from stoney_rl import data, lexemes

    if prepared.is_prepared(dataset):
        rows = prepared.read(dataset)[1].train
    else:
        rows = lexemes.annotate(data.load_rows(dataset).rows)
    if not rows:
        raise StoneyError(f"--dataset {dataset}: no row to attack; give a source with rows that can be read")
    return rows


def generate(args: argparse.Namespace, rows: list) -> list[str]:
    """Greedy answers of --null_model to the rows' prompts."""
    from stoney_rl import generation, models, prompts
    from stoney_rl.models import find_model, resolve_unpublished

    source = find_model(resolve_unpublished(args.null_model)[0])
    tokenizer = models.load_tokenizer(source)
    prompts.prepare_tokenizer(tokenizer)
    model = models.load_model(source, models.inference_dtype("auto")).to(models.device())
    texts = [""] * len(rows)
    for batch in generation.generate(
        model,
        tokenizer,
        [prompts.encode_prompt(tokenizer, row.prompt) for row in rows],
        ends=prompts.end_of_turn_ids(tokenizer),
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
    ):
        for done in batch:
            texts[done.index] = done.text
    return texts


if __name__ == "__main__":
    cli.run(main)
