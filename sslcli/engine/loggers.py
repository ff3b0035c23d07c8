"""Where metrics go besides the run folder. Each service is imported only when a preset asks for it."""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, final

from sslcli.config.base import Settings
from sslcli.config.presets import as_data
from sslcli.errors import UserError

PROJECT = "ssl"
"""Name of the W&B project and MLflow experiment, unless their own environment variables name another."""
IDS = "loggers.json"
"""File in the run folder with the id under which each service knows the run, so that a resumed run stays one."""


class Logger(Protocol):
    """Takes numbers as they come."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step."""
        ...

    def close(self, finished: bool) -> None:
        """No more numbers; `finished` says whether the run came to its end."""
        ...


def open_logger(name: str, folder: Path, preset: Settings, step: int) -> Logger:
    """The service of this name, for a run that starts after `step`.

    Raises:
        UserError: its package is missing, or the service refuses.
    """
    return OPEN[name](folder, preset, step)


@final
class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, folder: Path, preset: Settings, step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._events: Any = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        """Finish the files."""
        self._events.close()


@final
class WandB:
    """Weights & Biases; offline where `WANDB_MODE=offline` or `wandb offline` says so."""

    def __init__(self, folder: Path, preset: Settings, step: int) -> None:
        wandb = _package("wandb", "wandb")
        try:
            self._run: Any = wandb.init(
                dir=folder,
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=folder.resolve().name,
                id=_id_of(folder, "wandb", lambda: uuid.uuid4().hex[:12]),
                resume="allow",
                config=as_data(preset),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"`run.loggers`: wandb cannot start: {first_line(error)}",
                hint="log in with `wandb login`, or keep the numbers here with `WANDB_MODE=offline`",
            ) from error
        self._run.define_metric("*", step_metric="step")  # its own counter could not go back after a resume

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step."""
        self._run.log({**values, "step": step})

    def close(self, finished: bool) -> None:
        """Hand over what is left."""
        self._run.finish(exit_code=0 if finished else 1)


@final
class MLflow:
    """An MLflow server, or whatever `MLFLOW_TRACKING_URI` names."""

    def __init__(self, folder: Path, preset: Settings, step: int) -> None:
        mlflow = _package("mlflow", "mlflow")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        try:
            self._client: Any = mlflow.MlflowClient()
            self._run: str = _id_of(folder, "mlflow", lambda: self._new_run(name, folder, preset))
            self._client.update_run(self._run, status="RUNNING")
        except (mlflow.MlflowException, ImportError) as error:
            raise UserError(
                f"`run.loggers`: mlflow cannot start: {first_line(error)}",
                hint="name a server, e.g. `export MLFLOW_TRACKING_URI=http://localhost:5000`",
            ) from error

    def _new_run(self, name: str, folder: Path, preset: Settings) -> str:
        from mlflow.entities import Param

        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        made: str = self._client.create_run(number, run_name=folder.resolve().name).info.run_id
        words = [Param(key, value[:500]) for key, value in _leaves(as_data(preset))]
        for first in range(0, len(words), 100):  # no server takes more at a time
            self._client.log_batch(made, params=words[first : first + 100])
        return made

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self, finished: bool) -> None:
        """Say how it ended."""
        self._client.set_terminated(self._run, "FINISHED" if finished else "FAILED")


OPEN: dict[str, Callable[[Path, Settings, int], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def _package(module: str, extra: str) -> Any:
    import importlib

    try:
        found: ModuleType = importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"`run.loggers` names `{extra}`, but its package is not installed",
            hint=f"pip install 'sslcli[{extra}]'",
        ) from error
    return found


def _id_of(folder: Path, name: str, make: Callable[[], str]) -> str:
    """The id that a service gave this run, asked for once and kept in the run folder."""
    path = folder / IDS
    ids: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if name not in ids:
        ids[name] = make()
        path.write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
    return ids[name]


def _leaves(data: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values of nested plain data; nothing for what is null."""
    if isinstance(data, Mapping):
        for name, value in data.items():
            yield from _leaves(value, f"{key}.{name}".lstrip("."))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from _leaves(value, f"{key}.{number}")
    elif data is not None and data != "":
        yield key, str(data)


def first_line(error: Exception) -> str:
    """The beginning of what an error says."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
