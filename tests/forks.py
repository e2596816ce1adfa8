"""Starts Python processes that need not import torch and diffusers, which takes longer than what is tested.

A server imports them once and computes nothing. Each process is a fork of the server and then becomes what
Python would have made of the same command: it has its own arguments, environment, folder, streams, session and
exit code, and it is a child of the test, which can signal it and wait for it. What such a process starts with
`python -m` or `python FILE.py` is forked too, as long as the process has one thread.

    forks.run([sys.executable, "-m", "nft_core", ...], ...)   like subprocess.run
    forks.Popen(...)                                          like subprocess.Popen
    forks.run_together(command, 2, environment)               a group of processes
    forks.install(folder, name, code)                         a plug-in, for who has the folder on the path
    python forks.py ARGUMENTS                                 `python ARGUMENTS`, for scripts

The server's environment is that of the tests, with HF_HUB_OFFLINE=1 and OMP_NUM_THREADS=1, which libraries read
when they are imported. Use subprocess for a command that needs them otherwise, for what breaks an import, and
where the start of Python itself is tested. Elsewhere than on Linux all of this is subprocess.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

#: The server's socket.
PLACE = "NFT_TESTS_FORKS"
IMPORTS = [
    "nft_core.cli.app",
    "nft_core.runs.run",
    "nft_core.runs.inputs",
    "nft_core.runs.checkpoint",
    "nft_core.training.loop",
    "nft_core.models.sd3",
    "nft_core.planning.plan",
    "nft_core.scoring.composer",
    "nft_rewards.jpeg",
    "nft_solvers.dpm2",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
    "scipy.stats",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "diffusers.guiders",
    "safetensors.numpy",
    "nft_core.models.single_files",
    "nft_core.pages.gallery",
    "nft_core.runs.usage",
    "nft_core.training.attention",
    "PIL.ImageDraw",
    "PIL.PngImagePlugin",
    "PIL.JpegImagePlugin",
    "torch.profiler",
    "torch.distributed.launcher.api",
    "torch.utils.flop_counter",
    "click.testing",
    "rich.console",
    "rich.progress",
    "rich.table",
]


class Popen(subprocess.Popen):
    """A process that is forked from the server. limit: bytes that no file of it may grow beyond."""

    def __init__(self, command, *, limit=None, **more):
        self.limit = limit
        super().__init__(command, **more)

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        if sys.platform != "linux":
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
            return
        assert preexec_fn is None, "a function cannot be sent to the server"
        _, _, _, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *_, start_new_session, _ = rest
        request = {
            "arguments": [str(a) for a in args[1:]],
            "environment": dict(os.environ if env is None else env),
            "folder": str(cwd or Path.cwd()),
            "session": start_new_session,
            "limit": self.limit,
        }
        streams = [fd if fd >= 0 else number for number, fd in enumerate((p2cread, c2pwrite, errwrite))]
        with adopting():
            self.pid = ask(server(), request, streams)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def run(command, *, timeout=None, check=False, capture_output=False, **more):
    if capture_output:
        more |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **more) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def run_together(command, processes, env):
    """Run a command in several processes that meet as those of `nft run` do; returns what each said."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GLOO_SOCKET_IFNAME": "lo"}
        world["NFT_RENDEZVOUS"] = f"{folder}/rendezvous"
        said = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)]
        started = [
            Popen(command, env=env | world | {"RANK": str(n), "LOCAL_RANK": str(n)}, stdout=file, stderr=file)
            for n, file in enumerate(said)
        ]
        try:
            # The others wait for one that fails.
            while None in (codes := [process.poll() for process in started]) and not any(codes):
                time.sleep(0.02)
        finally:
            for process in started:
                process.kill()
                process.wait()
        for file in said:
            file.seek(0)
        texts = [file.read() for file in said]
    assert not any(codes), f"exit codes {codes}\n" + "\n".join(text[-3000:] for text in texts)
    return texts


def install(site, name, code):
    """Install a plug-in's module plug_NAME as the distribution plug-NAME; pip would take a second."""
    information = Path(site) / f"plug_{name}-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: plug-{name}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[nft_plugins]\n{name} = plug_{name}\n")
    (Path(site) / f"plug_{name}.py").write_text(code)


_started = []


def server():
    """The path of the socket; the first call starts the server, which ends with this process."""
    if not _started:
        folder = tempfile.TemporaryDirectory(prefix="forks-")
        path = f"{folder.name}/socket"
        process = subprocess.Popen(
            [sys.executable, __file__, "--serve", path],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", PLACE: path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout.readline() == b"ready\n"
        _started.append((path, process, folder))
    return _started[0][0]


@contextlib.contextmanager
def adopting():
    """Orphans among the descendants of this process become its children."""
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    try:
        yield
    finally:
        prctl(36, 0, 0, 0, 0)


def ask(path, request, streams):
    """Have the server fork; returns the number that it answers with."""
    data = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [len(data).to_bytes(8, "little")], streams)
        connection.sendall(data)
        answer = connection.makefile("rb").read()
    assert answer, "the server has ended"
    return int(answer)


def threads():
    return len(list(Path("/proc/self/task").iterdir()))


def serve(path):
    import gc
    import importlib
    import select

    sys.path[:] = [p for p in sys.path if p != str(Path(__file__).parent)]
    for name in IMPORTS:
        importlib.import_module(name)
    # transformers makes tables of a thousand patterns for the first model that a process loads.
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("clip")
    assert threads() == 1, "a fork has the calling thread alone"
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        print("ready", flush=True)
        os.dup2(2, 1)
        while listener in select.select([listener, 0], [], [])[0]:
            with listener.accept()[0] as connection:
                head, streams, _, _ = socket.recv_fds(connection, 8, 3)
                with connection.makefile("rb") as stream:
                    request = json.loads(stream.read(int.from_bytes(head, "little")))
                if request.pop("wait", False):
                    # A process of its own waits, so that others are served meanwhile.
                    if not os.fork():
                        if os.fork():
                            os._exit(0)
                        child = fork(request, streams, [listener, connection])
                        _, status = os.waitpid(child, 0)
                        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                        os._exit(0)
                    os.wait()
                else:
                    read, write = os.pipe()
                    if not (parent := os.fork()):
                        child = fork(request, streams, [listener, connection])
                        os.write(write, str(child).encode())
                        os._exit(0)
                    # Only when its parent has ended is the child that of who asked.
                    os.waitpid(parent, 0)
                    connection.sendall(os.read(read, 32))
                    os.close(read)
                    os.close(write)
                for fd in streams:
                    os.close(fd)


def fork(request, streams, sockets=()):
    child = os.fork()
    if not child:
        try:
            for number, fd in enumerate(streams):
                os.dup2(fd, number)
            for it in sockets:
                it.close()
            os.closerange(3, 1024)
            become(**request)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(120)
    return child


def become(arguments, environment, folder, session, limit):
    """Be `python ARGUMENTS` from here to the end of the process."""
    import importlib
    import resource
    import signal
    import weakref

    weakref.finalize._registry.clear()  # Such as the temporary folders of the process that it is forked from.
    if session:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if limit is not None:
        # Python ignores SIGXFSZ, and so what is too much is refused with an error.
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, 1 if number == 2 else -1, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        for number, mode, errors in ((0, "r", "strict"), (1, "w", "strict"), (2, "w", "backslashreplace"))
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    sys.path[:0] = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p and p not in sys.path]
    importlib.invalidate_caches()
    patch_popen()
    end(lambda: main([a for a in arguments if a != "-u"], bool(environment.get("PYTHONSAFEPATH"))))


def main(arguments, safe):
    import runpy

    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        if not safe:
            sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        import types

        sys.argv = ["-c", *arguments[2:]]
        if not safe:
            sys.path.insert(0, "")
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), module.__dict__)
    else:
        sys.argv = arguments
        if not safe:
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def end(work):
    """Call it and end as Python ends."""
    import atexit
    import resource
    import signal
    import threading

    code = 0
    try:
        work()
    except SystemExit as error:
        code = error.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))  # Coverage's figures are written at the end.
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        code = 120
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    if code and code < 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit((code or 0) & 255)


def patch_popen():
    """Fork what this process starts with `python -m` or `python FILE.py`, where it has no other thread."""
    start = subprocess.Popen._execute_child

    def execute(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        _, _, _, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *_, session, _ = rest
        words = [str(word) for word in args] if isinstance(args, (list, tuple)) else [args]
        forked = words[0] == sys.executable and ("-m" in words[1:3] or words[1].endswith(".py"))
        if not forked or preexec_fn or threads() > 1:
            return start(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
        request = {
            "arguments": words[1:],
            "environment": dict(os.environ if env is None else env),
            "folder": str(cwd or Path.cwd()),
            "session": session,
            "limit": None,
        }
        sys.stdout.flush()
        self.pid = fork(request, [fd if fd >= 0 else n for n, fd in enumerate((p2cread, c2pwrite, errwrite))])
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    subprocess.Popen._execute_child = execute


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
        os._exit(0)  # Nothing is left to do, and taking the modules apart takes a while.
    else:
        request = {"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": str(Path.cwd())}
        sys.exit(ask(os.environ[PLACE], request | {"session": False, "limit": None, "wait": True}, [0, 1, 2]))
