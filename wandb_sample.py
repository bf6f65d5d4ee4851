"""Does tracking work? Asks before any GPU is paid for: sends W&B a metric, a table, an image and an artifact, and reads
them back.

    python wandb_sample.py
    python wandb_sample.py --wandb_mode offline
    python wandb_sample.py --wandb_project my-project --timeout 60
    python wandb_sample.py --sync                # upload the runs that wait here, and link them to their inputs

With --sync it sends no sample: it uploads what offline, interrupted and killed runs left under ./wandb (or WANDB_DIR, or
the folder given), in order of time, and then declares which artifacts each run used, which offline runs cannot do.

Reads WANDB_API_KEY and the other variables of .env.example, from the environment or from .env; prints where a key was
found, never the key. Writes one small run: at W&B, or under ./wandb (or WANDB_DIR) if offline.

Exit codes:
  0  what was asked for works: everything arrived at W&B, or offline was asked for and everything is in the run's files
  2  bad arguments
  3  no key was found, so only an offline run was made
  4  the server did not answer or did not take the key, so only an offline run was made
  5  something did not arrive, or nothing could be written
"""

import argparse
import hashlib
import json
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from stoney_rl import cli, offline, tracking

EXIT_NO_KEY = 3
EXIT_NO_SERVER = 4
EXIT_MISSING = 5
METRIC, TABLE, IMAGE, ARTIFACT = "sample/metric", "sample/table", "sample/image", "wandb-sample"


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--timeout", type=cli.positive_float, default=30.0, help="seconds to wait for the server, and for what was sent"
    )
    parser.add_argument("--sync", nargs="?", const="", metavar="FOLDER", help="upload the runs that wait in FOLDER")
    cli.add_tracking_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = cli.parse_args(build_parser(), argv)
    if args.sync is not None:
        return sync(args)
    tracker = tracking.start_stage("wandb_sample", args, name="wandb_sample", timeout=args.timeout)
    refused = tracker.failures["start"] > 0
    show("mode", f"{tracker.mode} ({tracker.reason})")
    if tracker.mode == "disabled":
        return EXIT_MISSING if refused else 0
    show("key", f"found: {tracker.key_place}" if tracker.key_place else "none found")
    show("entity", tracker.entity or "your account's default")
    show("project", tracker.project)
    if tracker.mode == "online":
        show("server", f"{tracker.base_url} answers")
    elif refused:
        show("server", tracker.reason)

    mark = secrets.token_hex(8)  # what comes back must be what this very run sent
    try:
        sent = send(tracker, mark)
    except OSError as error:
        show("sent", f"nothing: {error}")
        return EXIT_MISSING
    finally:
        tracker.finish()
    if tracker.mode == "online":
        missing = arrived_online(tracker, mark, sent, args.timeout)
    else:
        deadline = time.monotonic() + args.timeout
        while (missing := written(tracker, mark)) and time.monotonic() < deadline:
            time.sleep(0.2)  # wandb's own process writes the file
    for what in ("metric", "table", "image", "artifact"):
        good = "arrived" if tracker.mode == "online" else "written"
        show(what, f"NOT {good}: {missing[what]}" if what in missing else good)
    if tracker.mode == "online":
        show("look at", tracker.url)
    else:
        show("look in", str(tracker.directory))
        show("upload with", tracker.sync_command)
    if missing:
        return EXIT_MISSING
    if refused:
        return EXIT_NO_SERVER
    return EXIT_NO_KEY if tracking.NO_KEY in tracker.reason else 0


def sync(args: argparse.Namespace) -> int:
    """Upload and link what waits in --sync's folder; the exit code."""
    import wandb

    folder = Path(args.sync) if args.sync else offline.wandb_root() / "wandb"
    server = tracking.find_server(args.wandb_entity, args.wandb_project)
    if not server.key_place:
        print(tracking.NO_KEY)
        return EXIT_NO_KEY
    state, detail = tracking.knock(server.base_url, server.key, args.timeout) if server.key else ("unclear", "")
    if state in ("down", "refused"):
        print(detail)
        return EXIT_NO_SERVER
    api = wandb.Api({"base_url": server.base_url}, api_key=server.key or None, timeout=max(1, round(args.timeout)))
    problems = offline.sync(folder, api)
    print(*problems or [f"{folder}: nothing is left to upload"], sep="\n")
    return EXIT_MISSING if problems else 0


def show(what: str, text: str | None) -> None:
    print(f"{what + ':':<13}{text}", flush=True)


def send(tracker: tracking.Tracker, mark: str) -> dict[str, Any]:
    """Log one of each; returns what the read-back needs. The files lie with the run, for a later `wandb sync`."""
    from PIL import Image

    folder = tracker.directory / "sample"
    folder.mkdir(parents=True)
    picture, note = folder / "gradient.png", folder / "note.txt"
    Image.linear_gradient("L").save(picture)
    note.write_text(f"An artifact from wandb_sample.py: {mark}\n", encoding="utf-8")
    for step in range(1, 4):
        tracker.log({METRIC: step / 2}, step=step)
    tracker.table(TABLE, ["what", "mark"], [["a row from wandb_sample.py", mark]])
    tracker.image(IMAGE, picture)
    reference = tracker.artifact(ARTIFACT, "sample", note)
    tracker.summary({"sample/mark": mark})
    return {"picture": picture, "note": note, "reference": reference}


def arrived_online(tracker: tracking.Tracker, mark: str, sent: dict[str, Any], timeout: float) -> dict[str, str]:
    """What cannot be read back from the server within ``timeout`` seconds: {what: why}."""
    import tempfile

    import wandb

    api = wandb.Api({"base_url": tracker.base_url}, timeout=max(1, round(min(timeout, 10))))
    path = f"{tracker.entity}/{tracker.project}"

    def download(run: Any, key: str, folder: str) -> bytes:
        with run.file(run.summary[key]["path"]).download(root=folder, replace=True) as file:
            return Path(file.name).read_bytes()

    def metric(run: Any, _: str) -> bool:
        return [row[METRIC] for row in run.history(keys=[METRIC], pandas=False)] == [0.5, 1.0, 1.5]

    def table(run: Any, folder: str) -> bool:
        return json.loads(download(run, TABLE, folder))["data"][0][1] == mark

    def image(run: Any, folder: str) -> bool:
        return download(run, IMAGE, folder) == sent["picture"].read_bytes()

    def artifact(_: Any, folder: str) -> bool:
        found = api.artifact(f"{path}/{sent['reference']}")
        return (Path(found.download(root=folder)) / "note.txt").read_bytes() == sent["note"].read_bytes()

    missing = dict.fromkeys(("metric", "table", "image", "artifact"), "not looked for")
    deadline = time.monotonic() + timeout
    while missing:
        for check in (metric, table, image, artifact):
            if check.__name__ not in missing:
                continue
            try:
                api.flush()  # W&B takes a moment to show what it was sent
                with tempfile.TemporaryDirectory() as folder:
                    same = check(api.run(f"{path}/{tracker.run_id}"), folder)
            except Exception as error:
                missing[check.__name__] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                continue
            if same:
                del missing[check.__name__]
            else:
                missing[check.__name__] = "what came back is not what was sent"
        if missing and time.monotonic() > deadline:
            break
        if missing:
            time.sleep(0.5)
    return missing


def written(tracker: tracking.Tracker, mark: str) -> dict[str, str]:
    """What an offline run's files do not hold: {what: why}."""
    files = tracker.directory / "files"
    logged: dict[tuple[str, ...], list[Any]] = {}
    artifacts = []
    try:
        for record in offline.records(tracker.directory / f"run-{tracker.run_id}.wandb"):
            for item in record.history.item:
                logged.setdefault(tuple(item.nested_key) or (item.key,), []).append(json.loads(item.value_json))
            if record.artifact.name == ARTIFACT:
                artifacts += [Path(entry.local_path).read_text("utf-8") for entry in record.artifact.manifest.contents]
        good = {"metric": logged.get((METRIC,)) == [0.5, 1.0, 1.5], "artifact": any(mark in note for note in artifacts)}
        for what, key in (("table", TABLE), ("image", IMAGE)):
            path, digest = (logged.get((key, part), [None])[0] for part in ("path", "sha256"))
            good[what] = path is not None and hashlib.sha256((files / path).read_bytes()).hexdigest() == digest
    except (OSError, ValueError) as error:
        return dict.fromkeys(("metric", "table", "image", "artifact"), f"{type(error).__name__}: {error}")
    return {what: "not in the run's files" for what, there in good.items() if not there}


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
