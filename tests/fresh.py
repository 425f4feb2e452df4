"""Code in fresh processes that have imported torch and nothing else: forks of one, since that takes seconds."""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SERVER = """
import json, os, sys, traceback, torch
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            file = os.open(os.path.join(request["folder"], name), os.O_RDWR | os.O_CREAT)
            os.dup2(file, number)
        sys.stdin = open(0)
        os.environ.update(request["environment"])
        sys.argv[1:] = request["arguments"]
        status = 0
        try:
            exec(compile(request["code"], "<fresh>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    return server


def run(code: str, *arguments: str, **environment: str) -> str:
    """What the code prints, run under these variables. Raises AssertionError with its errors if it fails."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        request = {"code": code, "arguments": arguments, "environment": environment, "folder": folder}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = server.stdout.readline().strip()
        assert status == "0", f"status {status or 'unknown'}: {Path(folder, 'stderr').read_text()}"
        return Path(folder, "stdout").read_text()
