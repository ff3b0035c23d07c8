import os
import subprocess
import sys
import time

from sslcli.data.workers import each


def test_whoever_leaves_does_not_wait_for_what_is_under_way():
    answers = each(time.sleep, [0, *[60] * 5], workers=1)
    next(answers)
    begun = time.monotonic()
    answers.close()
    assert time.monotonic() - begun < 30


def test_a_process_ends_with_its_parent():
    code = (
        "import os, time\nfrom sslcli.data.workers import each\n"
        "if __name__ == '__main__':\n"
        "    parents = each(os.getpgid, [0] * 6, workers=1)\n"
        "    next(parents)\n    print('ready', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, process_group=0) as parent:
        assert parent.stdout.readline() == b"ready\n"
        parent.kill()
    begun = time.monotonic()
    while time.monotonic() - begun < 30 and group_lives(parent.pid):
        time.sleep(0.1)
    assert not group_lives(parent.pid)


def group_lives(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True
