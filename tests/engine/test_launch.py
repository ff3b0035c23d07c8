"""What the launcher makes of the ways in which ranks end; real processes are in tests/e2e/test_restarts.py."""

import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState  # noqa: TID251
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure  # noqa: TID251

from sslcli.engine import launch
from sslcli.engine.pretrain import stop_signals
from sslcli.errors import DivergedError, SslError, StoppedOnRequest, UserError


def ended(codes: dict[int, int], later: tuple[int, ...] = ()) -> RunResult:
    failures = {}
    for rank, code in codes.items():
        failures[rank] = ProcessFailure(local_rank=rank, pid=1000 + rank, exitcode=code, error_file="none")
        failures[rank].timestamp = 100 + 30 * (rank in later)
    return RunResult(state=WorkerState.FAILED, failures=failures)


def leave(folder: Path, monkeypatch: pytest.MonkeyPatch, rank: int, error: SslError) -> None:
    monkeypatch.setenv("SSL_WORDS", str(folder))
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(type(error)), launch.last_words():
        raise error


def test_errors_of_ours_reach_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    leave(tmp_path, monkeypatch, 10, UserError("no such image", hint="add it"))
    leave(tmp_path, monkeypatch, 2, SslError("a loader process died"))
    words = launch.words_in(tmp_path)
    assert list(words) == [2, 10]
    assert words[10] == launch.Word("no such image", "add it", code=2, final=True)
    assert not words[2].final


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (DivergedError("nan"), True),
        (StoppedOnRequest("stopped"), True),
        (SslError("disk full"), False),
    ],
)
def test_decisions_are_final_and_failures_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: SslError, final: bool
):
    leave(tmp_path, monkeypatch, 0, error)
    assert launch.words_in(tmp_path)[0].final is final


@pytest.mark.parametrize("ranked", [False, True])
def test_a_rank_that_ends_is_not_cut_off_by_its_launcher(monkeypatch: pytest.MonkeyPatch, ranked: bool):
    """Another rank was quicker, and the launcher ends those that are still writing down why they end."""
    monkeypatch.delenv("RANK", raising=False)
    if ranked:
        monkeypatch.setenv("RANK", "0")
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(DivergedError), stop_signals():
            raise DivergedError("nan")
        assert signal.getsignal(signal.SIGTERM) == (signal.SIG_IGN if ranked else before)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_a_rank_that_lost_the_others_says_so_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as caught, launch.last_words():
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer")
    assert caught.value.code == 1
    assert capsys.readouterr().err == "rank 3 has lost another rank\n"
    with pytest.raises(RuntimeError, match="shapes"), launch.last_words():
        raise RuntimeError("shapes do not match")


def test_the_reason_is_the_first_that_was_killed():
    kill, term = -signal.SIGKILL, -signal.SIGTERM
    assert launch.reason(ended({0: 1, 1: kill}), {}) == "rank 1: SIGKILL"
    assert launch.reason(ended({0: term, 1: -signal.SIGSEGV}), {}) == "rank 1: SIGSEGV"
    assert launch.reason(ended({0: kill, 1: kill}, later=(0,)), {}) == "rank 1: SIGKILL"
    word = launch.Word("a loader process died", None, 1, final=False)
    assert launch.reason(ended({0: 1, 1: 1}), {1: word}) == "rank 1: a loader process died"
    assert launch.reason(ended({0: term, 1: 1}), {}) == "exit code 1"


def test_exit_codes_keep_their_meaning():
    assert launch._exit_code(ended({0: 2, 1: 2}), {}, 0) == 2
    assert launch._exit_code(ended({0: 75, 1: 75}), {}, 0) == 75
    assert launch._exit_code(ended({0: -15, 1: 75}), {}, 0) == 75
    assert launch._exit_code(ended({0: 1, 1: 1}), {}, 0) == 1


def test_the_first_rank_has_spoken_and_others_speak_through_the_launcher():
    words = {rank: launch.Word("diverged", "lower it", 1, final=True) for rank in (0, 1)}
    assert launch._exit_code(ended({0: 1, 1: 1}), words, 3) == 1
    unreadable = launch.Word("`a.jpg` cannot be read", "repair it", 2, final=True)
    with pytest.raises(SslError, match=r"rank 1: `a\.jpg` cannot be read") as caught:
        launch._exit_code(ended({0: 1, 1: 2}), {1: unreadable}, 0)
    assert caught.value.exit_code == 2
    assert caught.value.hint == "repair it"
    stopped = launch.Word("stopped on request at step 5", None, 75, final=True)
    with pytest.raises(StoppedOnRequest, match=r"^stopped on request at step 5"):
        launch._exit_code(ended({8: 75}), {8: stopped}, 0)


def test_a_killed_rank_is_named_with_what_to_do():
    with pytest.raises(SslError, match=r"rank 1: SIGKILL") as caught:
        launch._exit_code(ended({0: 1, 1: -signal.SIGKILL}), {}, 0)
    assert "--max-restarts" in (caught.value.hint or "")
    with pytest.raises(SslError, match=r"3 restart\(s\) are used up"):
        launch._exit_code(ended({0: 1, 1: -signal.SIGKILL}), {}, 3)


def test_why_a_command_goes_on(monkeypatch: pytest.MonkeyPatch):
    for name in ("SSL_RESTARTED", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert launch.restarted() is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    assert launch.restarted() == "SLURM started this job again (restart 4)"
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert "SLURM" in (launch.restarted() or "")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert launch.restarted() == "restarted (2 of 3) after a process died"
    monkeypatch.setenv("SSL_RESTARTED", "(2 of 3) after a process died (rank 1: SIGKILL)")
    assert launch.restarted() == "restarted (2 of 3) after a process died (rank 1: SIGKILL)"
