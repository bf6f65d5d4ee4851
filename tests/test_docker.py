"""The image without an engine: what would be copied into it, and its start command, run here in a folder like the mounted one.

`make docker-check` also installs what the Dockerfile installs, into a fresh virtual environment (minutes, needs a package
registry), and trains with that.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from complete import only_complete
from docker.utils import exclude_paths

REPOSITORY = Path(__file__).resolve().parent.parent
DOCKERFILE = REPOSITORY / "Dockerfile"
CODE = "/opt/stoney-rl"
OTHER = 12345  # user and group of the mounted folder, known to no passwd file
KEY = "0123456789abcdef0123456789abcdef01234567"  # has the shape of a W&B key, and is none
TOOLS = Path(sys.executable).parent
SITE_PACKAGES = Path(pytest.__file__).parent.parent
COMPLETE = bool(os.environ.get("STONEY_RL_DOCKER_CHECK"))


def instructions(name: str) -> list[str]:
    """The arguments of every instruction ``name`` of the Dockerfile, continued lines joined."""
    joined = DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.split(maxsplit=1)[1] for line in joined.splitlines() if line.startswith(name + " ")]


def copies() -> list[tuple[list[str], str]]:
    """(sources, destination) of every COPY."""
    found = [shlex.split(arguments) for arguments in instructions("COPY")]
    return [(words[:-1], words[-1]) for words in found]


def build_context(root: Path) -> set[str]:
    """The files below ``root`` that Docker would send to the build, as its Python client reads .dockerignore."""
    patterns = [line.strip() for line in (root / ".dockerignore").read_text(encoding="utf-8").splitlines()]
    kept = exclude_paths(str(root), [line for line in patterns if line and not line.startswith("#")])
    return {path for path in kept if (root / path).is_file()} - {"Dockerfile", ".dockerignore"}


# What is written down


def lint(tool: str, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([TOOLS / tool, *arguments], input=text, capture_output=True, text=True, cwd=REPOSITORY)


def test_the_linters_have_nothing_to_say():
    for done in (lint("hadolint", "Dockerfile"), lint("shellcheck", "docker-entrypoint.sh")):
        assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr
    careless = lint("hadolint", "-", text="FROM python\nRUN pip install torch\n")
    assert careless.returncode == 1 and {"DL3006", "DL3013"} <= set(re.findall(r"DL\d+", careless.stdout))


def test_the_image_installs_exactly_what_is_locked():
    lock = set((REPOSITORY / "requirements.lock").read_text(encoding="utf-8").splitlines())
    (install,) = (line for line in instructions("RUN") if "pip install" in line)
    named = re.findall(r"-r (\S+)", install)
    assert named == ["requirements.txt", "requirements-gpu.txt"] and "-c requirements.lock" in install
    for file in [*named, "requirements-dev.txt"]:
        pins = [line for line in (REPOSITORY / file).read_text(encoding="utf-8").lower().splitlines() if "==" in line]
        assert pins and {pin.replace("_", "-") for pin in pins} <= {line.split(" ;")[0] for line in lock}


def test_the_base_image_has_the_cuda_and_the_python_that_are_pinned():
    (base,) = instructions("FROM")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)
    lock = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8")
    (cuda,) = re.findall(r"^cuda-toolkit==(\d+\.\d+)", lock, re.MULTILINE)
    said = DOCKERFILE.read_text(encoding="utf-8") + (REPOSITORY / "docker-entrypoint.sh").read_text(encoding="utf-8")
    assert f"CUDA {cuda}" in said and f"CUDA {cuda.split('.')[0]}:" in said


def test_a_change_of_code_installs_nothing_again():
    before, _ = DOCKERFILE.read_text(encoding="utf-8").split("pip install")
    copied_before = re.findall(r"^COPY (.+)", before, re.MULTILINE)
    assert copied_before == ["requirements.txt requirements-gpu.txt requirements.lock ./"]


# What gets into the image


@pytest.fixture(scope="module")
def context() -> set[str]:
    return build_context(REPOSITORY)


def test_everything_that_is_copied_is_in_the_context(context):
    for sources, _ in copies():
        for source in sources:
            named = list(REPOSITORY.glob(source))
            assert named, f"COPY {source}: no such file"
            for path in named:
                relative = path.relative_to(REPOSITORY).as_posix()
                assert any(file == relative or file.startswith(relative + "/") for file in context), relative


def test_the_context_is_small_and_holds_nothing_but_what_is_copied(context):
    wanted = {path for sources, _ in copies() for source in sources for path in REPOSITORY.glob(source)}
    assert all(wanted & {REPOSITORY / file, *(REPOSITORY / file).parents} for file in context)
    size = sum((REPOSITORY / file).stat().st_size for file in context)
    print(f"build context: {len(context)} files, {size / 1e6:.2f} MB")
    assert size < 5e6


def test_no_resource_of_the_library_is_left_out(context):
    there = {
        path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "stoney_rl").rglob("*") if path.is_file()
    }
    left_out = {path for path in there if not path.endswith((".md", ".pyc"))} - context
    assert not left_out, f"add them to .dockerignore: {sorted(left_out)}"


SECRETS = """
.env .env.local .netrc id_rsa server.pem key.txt notes.md data/rows.jsonl data/private/rows.jsonl data/planted/.env
data/planted/.rows.jsonl stoney_rl/.env stoney_rl/interp/.env.py stoney_rl/token.txt stoney_rl/interp/key.json
wandb/settings wandb/run-1/config.py wandb/run-1/files/report.js .git/config .home/.netrc .home/.cache/huggingface/token
.venv/lib/site.py checkpoints/smollm2-135m/config.json stoney_lora_phi3_local_ckpt.partial/checkpoint-1/trainer.py
results/numbers.json tests/.env tests/keys.py benchmarks/keys.py
""".split()  # noqa: SIM905


def test_no_secret_gets_into_the_context(tmp_path, context):
    for file in [*context, ".dockerignore"]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / file, tmp_path / file)
    for file in SECRETS:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(f"WANDB_API_KEY={KEY}\n")
    assert build_context(tmp_path) == context
    assert not [file for file in context if KEY.encode() in (tmp_path / file).read_bytes()]
    (tmp_path / ".dockerignore").write_text(".env\n")  # a list of what to leave out would not have done
    assert len(build_context(tmp_path) & set(SECRETS)) > 20


# What starts in it


@pytest.fixture(scope="session")
def image():
    """A folder with the image's code, put there by the Dockerfile's own COPY lines from what the context holds."""
    root = Path(tempfile.mkdtemp(prefix="stoney-rl-image-"))  # not tmp_path: no other user may enter pytest's folders
    root.chmod(0o755)
    code = root / CODE.lstrip("/")
    context = build_context(REPOSITORY)
    for sources, destination in copies():
        for source in sources:
            for path in REPOSITORY.glob(source):
                target = code / destination / ("" if path.is_dir() else path.name)
                for file in [file for file in map(REPOSITORY.joinpath, context) if path in (file, *file.parents)]:
                    place = target / file.relative_to(path) if path.is_dir() else target
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, place)
    yield code
    shutil.rmtree(root)


def others_can(*command: object) -> bool:
    # env, since setpriv has root's capabilities until it has started something, and would find what no other can.
    become = ["setpriv", f"--reuid={OTHER}", f"--regid={OTHER}", "--clear-groups", "env"]
    return subprocess.run([*become, *command], capture_output=True, cwd="/").returncode == 0


@pytest.fixture(scope="session")
def owner() -> int:
    """Whom the mounted folder belongs to: a user without a name, where the tests may give it to one."""
    return OTHER if os.geteuid() == 0 and others_can("test", "-x", SITE_PACKAGES) else os.geteuid()


@pytest.fixture(scope="session")
def interpreter(image, owner) -> dict[str, str]:
    """The environment variables with which ``owner`` finds a `python` that has what the image has."""
    python, libraries, search = Path(sys.executable), "", ""
    if owner == OTHER and not others_can(python, "-c", "import encodings"):  # it is below /root: make one that is not
        copy = image.parent / "python"
        shutil.copytree(sys.base_prefix, copy, symlinks=True, ignore=shutil.ignore_patterns("site-packages", "test"))
        python, libraries, search = copy / "bin/python", f"{copy}/lib", str(SITE_PACKAGES)
    if COMPLETE:
        python, search = installed(image, python, LD_LIBRARY_PATH=libraries), ""
    return {"PATH": f"{python.parent}:/usr/bin:/bin", "LD_LIBRARY_PATH": libraries, "PYTHONPATH": search}


def installed(image: Path, base: Path, **env: str) -> Path:
    """The interpreter of a fresh virtual environment in which the Dockerfile's own pip line has run."""
    env = dict(os.environ, **env)
    subprocess.run([base, "-m", "venv", image.parent / "venv"], check=True, env=env)
    python = image.parent / "venv/bin/python"
    (line,) = (line for line in instructions("RUN") if "pip install" in line)
    command = shlex.split(re.sub(r"--mount=\S+", "", line))
    assert command[0] == "python"
    subprocess.run([python, *command[1:]], check=True, cwd=image, env=env)
    return python


@pytest.fixture
def folder(owner):
    """What is mounted: a folder of ``owner``'s with nothing in it."""
    yield from given_folder(owner)


def given_folder(owner: int):
    root = Path(tempfile.mkdtemp(prefix="stoney-rl-mount-"))
    root.chmod(0o755)
    os.chown(root, owner, owner if owner == OTHER else -1)
    yield root
    shutil.rmtree(root)


def start_command(image: Path, *arguments: object) -> list[str]:
    """What `docker run stoney-rl-local ARGUMENTS` would start, without tini."""
    (entrypoint,), (default,) = instructions("ENTRYPOINT"), instructions("CMD")
    tini, dashes, script = json.loads(entrypoint)
    assert (tini, dashes) == ("tini", "--")
    words = [str(word) for word in arguments] or json.loads(default)
    return [script.replace(CODE, str(image)), *words]


def environment(interpreter: dict[str, str], **more: str) -> dict[str, str]:
    set_in_image = dict(pair.split("=", 1) for line in instructions("ENV") for pair in shlex.split(line))
    return set_in_image | interpreter | {"HOME": "/root", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


@pytest.fixture
def start(image, interpreter, folder):
    def started(*arguments: object, become: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess:
        command = [*become, *start_command(image, *arguments)]
        env = environment(interpreter, **env)
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)

    return started


AS_ANOTHER = ("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups")  # as docker run --user 54321:54321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def test_it_runs_as_the_folders_owner_for_good(start, folder, owner):
    done = start("sh", "-c", "id -u; id -g; id -G; touch made; cat /proc/self/status")
    assert done.returncode == 0, done.stderr
    user, group, groups, *status = done.stdout.splitlines()
    assert int(user) == owner == (folder / "made").stat().st_uid
    if os.geteuid() == 0:
        assert int(group) == int(groups) == owner == (folder / "made").stat().st_gid
        privileges = dict(line.split(":\t") for line in status if line.startswith(("Cap", "NoNewPrivs")))
        assert {name: int(value, 16) for name, value in privileges.items()} == {
            "NoNewPrivs": 1, "CapInh": 0, "CapPrm": 0, "CapEff": 0, "CapBnd": 0, "CapAmb": 0,
        }  # fmt: skip


@needs_root
def test_a_folder_of_roots_keeps_root_but_no_capability(start, folder):
    os.chown(folder, 0, 0)
    (folder / "private").mkdir(mode=0o700)
    os.chown(folder / "private", OTHER, OTHER)
    done = start("sh", "-c", "id -u; touch made; ls private; grep -E '^Cap(Eff|Bnd)' /proc/self/status")
    assert done.stdout.split() == ["0", "CapEff:", "0" * 16, "CapBnd:", "0" * 16]
    assert (folder / "made").stat().st_uid == 0 and "private" in done.stderr  # root's power to read it is gone


@needs_root
def test_with_user_no_root_is_needed(start, folder):
    os.chown(folder, 54321, 54321)
    done = start("sh", "-c", "id -u; touch made", become=AS_ANOTHER)
    assert done.stdout == "54321\n" and (folder / "made").stat().st_uid == 54321


@needs_root
def test_a_folder_that_cannot_be_written_gets_one_line(start, folder):
    done = start(become=AS_ANOTHER)
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert re.search(rf"{folder} can't be written by user 54321 \(it is user \d+'s\).*leave out --user", done.stderr)
    assert not any(folder.iterdir())


def test_home_and_name_are_there_for_a_user_whom_no_file_knows(start, folder, owner):
    code = "import getpass, pathlib; print(getpass.getuser()); print(pathlib.Path.home())"
    done = start("python", "-c", code)
    assert done.stdout.splitlines() == [f"user-{owner}", f"{folder}/.home"], done.stderr
    assert (folder / ".home").stat().st_uid == owner


def test_flags_go_to_the_default_stage_and_names_to_the_images_own_scripts(start, folder):
    (folder / "train_grpo.py").write_text("print('of the folder')")
    (folder / "mine.py").write_text("import sys; print('of the folder', sys.argv)")
    assert start("--help").stdout.startswith("usage: train_lora_local.py")
    assert start("train_grpo.py", "--help").stdout.startswith("usage: train_grpo.py")
    assert start("python", "train_grpo.py", "--help").stdout.startswith("usage: train_grpo.py")
    assert start("python", "mine.py", "a b").stdout == "of the folder ['mine.py', 'a b']\n"
    assert start("python", "./train_grpo.py").stdout == "of the folder\n"
    assert start("sh", "-c", "exit 75").returncode == 75


SMI = "#!/bin/sh\necho '{}, NVIDIA A10, 22000 MiB, 23028 MiB'\n"


@pytest.mark.parametrize(
    ("smi", "said"),
    [
        (None, "no GPU: give docker run --gpus all"),
        (SMI.format("580.95.05"), r"GPU \(driver, name, .*\): 580.95.05, NVIDIA A10, 22000 MiB, 23028 MiB$"),
        (SMI.format("575.57.08"), r"driver 575.57.08 is too old for CUDA 13.*580 or newer"),
        (
            "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'; exit 18\n",
            "Failed to init.*mism",
        ),
    ],
)
def test_the_first_line_says_what_gpu_there_is(start, interpreter, folder, owner, smi, said):
    (folder / "bin").mkdir()
    if smi:
        (folder / "bin/nvidia-smi").write_text(smi)
        (folder / "bin/nvidia-smi").chmod(0o755)
    done = start("true", PATH=f"{folder}/bin:{interpreter['PATH']}")
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and not done.stdout
    assert lines[0].startswith(f"container: user {owner}; ") and re.search(said, lines[-1])
    assert len(lines) == 1 + ("575" in (smi or ""))


def test_sigterm_reaches_the_stage_and_its_exit_code_comes_back(image, interpreter, folder):
    code = (
        "import os, signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        "print(os.getpid(), flush=True); signal.pause()"
    )
    command = start_command(image, "python", "-c", code)
    env = environment(interpreter)
    running = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert int(running.stdout.readline()) == running.pid  # no shell in between
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=20) == 75
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.stdout.close()


# A training run in it, to the end


@pytest.fixture(scope="module")
def trained(image, interpreter, owner):
    """(folder, process) of the image's default stage on a tiny model and planted rows, with a key in the folder's .env."""
    from tests import tiny

    for folder in given_folder(owner):
        tiny.checkpoint(folder / "base")
        lines = (REPOSITORY / "data/planted/rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "rows.jsonl").write_text("".join(lines[:200]), encoding="utf-8")
        (folder / ".env").write_text(f"WANDB_API_KEY={KEY}\nWANDB_MODE=offline\nWANDB_RUN_GROUP=from-the-folder\n")
        (folder / ".env").chmod(0o600)
        for path in [folder / ".env", folder / "rows.jsonl", folder / "base", *(folder / "base").iterdir()]:
            os.chown(path, owner, -1)
        flags = [
            "--model",
            "base",
            "--dataset",
            "rows.jsonl",
            "--max_steps",
            "2",
            "--batch_size",
            "2",
            "--eval_steps",
            "0",
        ]
        command = start_command(image, *flags, "--dtype", "fp32", "--gradient_accumulation_steps", "1")
        env = environment(interpreter)
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
        yield folder, done


@only_complete
def test_it_trains_to_the_end_and_leaves_the_outputs_in_the_folder(trained):
    folder, done = trained
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("stoney_lora_phi3_local_ckpt", "stoney_lora_phi3_local_merged"):
        stage = json.loads((folder / name / "stage.json").read_text(encoding="utf-8"))
        assert stage["stage"] == "sft" and stage["training"]["steps"] == 2


def test_everything_it_writes_is_the_owners(trained, owner):
    folder, _ = trained
    others = [path for path in folder.rglob("*") if path.lstat().st_uid != owner]
    assert not others
    if owner == OTHER:
        assert {path.lstat().st_gid for path in folder.rglob("stoney_lora_phi3_local_*")} == {OTHER}
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o700 == 0o700 for path in folder.iterdir() if path.is_dir())


@only_complete
def test_the_folders_env_file_is_read_and_its_key_goes_nowhere(trained):
    folder, done = trained
    assert "tracking: W&B offline (WANDB_MODE=offline), group from-the-folder" in done.stdout
    assert any((folder / "wandb").glob("offline-run-*"))
    assert KEY not in done.stdout + done.stderr
    holding = [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert holding == [folder / ".env"]


def test_the_image_itself_is_left_as_it_was(trained, image, context):
    assert {path.relative_to(image).as_posix() for path in image.rglob("*") if path.is_file()} == context
