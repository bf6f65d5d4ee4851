"""A Python that has the slow libraries loaded already: tests that start stages as processes save seconds with each.

``start(directory)`` starts a server, which imports torch and the like once, and gives the path of a program ``python``
beside a socket. That program takes a script and its arguments as Python does. The server forks, and the child runs the
script with the caller's working directory, environment, files and exit code; processes that it starts by ``sys.executable`` are as warm. A SIGTERM or SIGINT to the program reaches
the script; a SIGKILL does not.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CLIENT = """\
    #!{python} -IS
    import json, os, signal, socket, sys
    if sys.argv[1].startswith("-"):  # -c and -m are left to a Python that starts
        os.execv({python!r}, [{python!r}, *sys.argv[1:]])
    link = socket.socket(socket.AF_UNIX)
    link.connect({address!r})
    told = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(link, [len(told).to_bytes(8, "big")], [0, 1, 2])
    link.sendall(told)
    answers = link.makefile()
    child = int(answers.readline())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(child, number))
    code = int(answers.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
"""


@contextlib.contextmanager
def start(directory: Path):
    """Yield the warm ``python`` of a server that lives as long as the block."""
    address = Path(directory) / "warm.sock"
    program = Path(directory) / "python"
    program.write_text(textwrap.dedent(CLIENT).format(python=sys.executable, address=str(address)), encoding="utf-8")
    program.chmod(0o755)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    server = subprocess.Popen([sys.executable, __file__, str(address)], env=env)
    try:
        until = time.monotonic() + 120
        while not address.exists():
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the warm Python did not start")
            time.sleep(0.05)
        yield program
    finally:
        server.kill()
        server.wait()


def serve(address: str) -> None:
    import datasets, matplotlib.pyplot, peft, sklearn.model_selection, torch, transformers, trl  # noqa: E401, F401, I001
    from transformers import PreTrainedModel, Trainer  # noqa: F401
    from trl import SFTConfig, SFTTrainer  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # handlers are reaped by the system
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen(64)
    os.rename(address + ".new", address)
    while True:
        link, _ = listener.accept()
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            handle(link)
        link.close()


def handle(link: socket.socket) -> None:
    """Run what one client asks for in a child, and tell the client its number and its exit code."""
    size, files, *_ = socket.recv_fds(link, 8, 3)
    answers = link.makefile("w")
    argv, folder, environ = json.loads(link.makefile("rb").read(int.from_bytes(size, "big")))
    child = os.fork()
    if not child:
        link.close()
        os._exit(run(argv, folder, environ, files))
    print(child, file=answers, flush=True)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        print(status, file=answers, flush=True)
    os._exit(0)


def run(argv: list[str], folder: str, environ: dict[str, str], files: list[int]) -> int:
    """The script as ``python`` would run it, in this process; its exit code."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    sys.executable, *sys.argv[:] = argv
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    # What a Python that ends does: W&B, among others, finishes there.
    import atexit
    import threading

    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code


if __name__ == "__main__":
    serve(sys.argv[1])
