"""A study's MLflow store as one small file beside this one, without weights: kept, and made whole again.

    python experiments/results/store.py keep OUTPUT NAME
    python experiments/results/store.py restore NAME OUTPUT

OUTPUT is the study's output folder, NAME.tar.xz the file. `ssl-ray report` then makes the page again, and `ssl-ray run`
goes on from there: what is finished is neither pretrained nor trained again.
"""

import sqlite3
import sys
import tarfile
import tempfile
from contextlib import closing
from pathlib import Path

HERE = Path(__file__).parent
_PLACE = "/kept/results"
"""Stands for the output folder, whose artifacts MLflow knows by absolute paths."""
_LEFT_OUT = (".safetensors", ".pt", "/models", "/report")
"""Ends of names: weights, networks with their code, and pages that are made again."""


def keep(output: Path, name: str) -> Path:
    """Pack MLflow's database and artifacts of an output folder -> the file."""
    output, path = output.absolute(), HERE / f"{name}.tar.xz"
    with tempfile.TemporaryDirectory() as folder, tarfile.open(path, "w:xz") as packed:
        script = Path(folder) / "mlflow.sql"
        with closing(sqlite3.connect(f"file:{output / 'mlflow.db'}?mode=ro", uri=True)) as database:
            script.write_text("\n".join(database.iterdump()).replace(str(output), _PLACE))
        packed.add(script, script.name, filter=_plain)
        packed.add(output / "artifacts", "artifacts", filter=_plain)
    return path


def restore(name: str, output: Path) -> None:
    """Unpack it into an output folder that has no store yet."""
    output = output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    if (output / "mlflow.db").exists():
        raise SystemExit(f"{output}: has a store of its own")
    with tarfile.open(HERE / f"{name}.tar.xz") as packed:
        packed.extractall(output, filter="data")
    script = output / "mlflow.sql"
    with closing(sqlite3.connect(output / "mlflow.db")) as database:
        database.executescript(script.read_text().replace(_PLACE, str(output)))
    script.unlink()


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """The entry without whose file it was and when; None for what is left out."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return None if entry.name.endswith(_LEFT_OUT) else entry


if __name__ == "__main__":
    match sys.argv[1:]:
        case "keep", output, name:
            print(keep(Path(output), name))
        case "restore", name, output:
            restore(name, Path(output))
        case _:
            raise SystemExit(__doc__)
