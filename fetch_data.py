"""Fetches the 52,002 rows that Stanford released in 2023, byte for byte, and writes their licence beside them.

    python fetch_data.py                                        # to data/stanford/alpaca_data.json, 23 MB
    python fetch_data.py --source hub                           # the same rows from the Hugging Face Hub
    python fetch_data.py --from_file COPY.json                  # one second: checks a copy that you have, and takes it

The file is checked against the size, the sha256 and the git blob id of the release before it gets its name. An
interrupted download goes on where it stopped. The rows are CC BY-NC 4.0: models trained on them are for
non-commercial use.
"""

import hashlib
import http.client
import json
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

from alpaca.common.cli import run_cli
from alpaca.common.errors import UserError, first_line
from alpaca.common.files import atomic_write, refuse_existing

GITHUB = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
HUB = "tatsu-lab/alpaca"  # the rows as Parquet, with a column `text` that the release does not have
SIZE = 22_773_992
SHA256 = "2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419"
GIT_BLOB = "3779ddbc040543ab1834ef216c983d6fcc06cc9a"
LICENCE = """\
alpaca_data.json in this folder is the data set of Stanford Alpaca (Rohan Taori, Ishaan Gulrajani, Tianyi Zhang,
Yann Dubois, Xuechen Li, Carlos Guestrin, Percy Liang, Tatsunori B. Hashimoto; Stanford University, 2023), unchanged,
from https://github.com/tatsu-lab/stanford_alpaca.

Licence: Creative Commons Attribution-NonCommercial 4.0 International (CC BY-NC 4.0),
https://creativecommons.org/licenses/by-nc/4.0/legalcode

The rows were written by OpenAI's text-davinci-003. Use them, and models trained on them, for non-commercial purposes.
"""
ATTEMPTS = 5


def fetch(
    output_dir: str = "data/stanford",
    source: str = "github",
    from_file: str | None = None,
    url: str | None = None,
    timeout: float = 60.0,
    overwrite: bool = False,
) -> None:
    """Writes OUTPUT_DIR/alpaca_data.json, checked against the release, and OUTPUT_DIR/LICENSE.txt.

    Args:
        output_dir: the folder for the two files.
        source: github, or hub for the Hugging Face Hub.
        from_file: a copy on this machine instead; nothing is downloaded.
        url: another address of the same file, such as a mirror.
        timeout: seconds without data after which an attempt is given up.
        overwrite: replace a file of this name that is not the release.

    Raises:
        UserError: no connection, or a file that is not the release; nothing stands under the final name then.
    """
    if source not in ("github", "hub"):
        raise UserError(f"--source takes github or hub, found {source!r}.")
    target = Path(output_dir) / "alpaca_data.json"
    if target.is_file() and not difference(target):
        print(f"{target} is there already, byte for byte the release.")
    else:
        refuse_existing(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        if from_file:
            copy(Path(from_file), partial)
        elif source == "hub" and not url:
            rebuild_from_hub(partial)
        else:
            download(url or GITHUB, partial, timeout)
        if problem := difference(partial):
            partial.unlink()
            kept = "left where it is" if from_file else "removed"
            raise UserError(f"{from_file or url or source}: {problem}. It is not the released file and was {kept}.")
        partial.replace(target)
        print(f"{target}: {SIZE:,} bytes, sha256 {SHA256}, git blob {GIT_BLOB}, as released.")
    with atomic_write(target.with_name("LICENSE.txt")) as stream:
        stream.write(LICENCE)
    print(f"\n{LICENCE}\nTrain on it: python train.py RUN.yaml --data_path {target}")


def difference(path: Path) -> str:
    """What tells a file from the release; "" where it is the release."""
    size = path.stat().st_size
    if size != SIZE:
        return f"{size:,} bytes where the release has {SIZE:,}"
    data = path.read_bytes()
    for what, found, expected in (
        ("sha256", hashlib.sha256(data).hexdigest(), SHA256),
        ("git blob id", hashlib.sha1(b"blob %d\0" % size + data).hexdigest(), GIT_BLOB),
    ):
        if found != expected:
            return f"{what} {found} where the release has {expected}"
    return ""


def copy(source: Path, partial: Path) -> None:
    if not source.is_file():
        raise UserError(f"no file {source} for --from_file.")
    shutil.copyfile(source, partial)


def download(url: str, partial: Path, timeout: float) -> None:
    """Downloads `url` to `partial`, going on behind the bytes that are there. UserError after ATTEMPTS failures."""
    for attempt in range(1, ATTEMPTS + 1):
        have = partial.stat().st_size if partial.is_file() else 0
        if have > SIZE:
            partial.unlink()
            have = 0
        if have == SIZE:
            return
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                if reply.headers.get_content_type() == "text/html":
                    problem = "the answer is a web page (a sign-in, or an address that moved?), not the file"
                    break
                # A server without ranges sends the whole file again.
                with open(partial, "ab" if have and reply.status == 206 else "wb") as stream:
                    shutil.copyfileobj(reply, stream)
            if partial.stat().st_size >= SIZE:
                return
            problem = f"the connection ended after {partial.stat().st_size:,} of {SIZE:,} bytes"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # what is there reaches beyond the server's file
                partial.unlink()
            problem = f"the server says {error.code} {error.reason}"
            if error.code in (401, 403, 404, 410):
                break
        except (OSError, http.client.HTTPException) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        except ValueError as error:  # no address at all
            raise UserError(f"--url takes an address that begins with https://, found {url!r}: {error}.") from error
        print(f"attempt {attempt} of {ATTEMPTS}: {problem}", flush=True)
        if attempt < ATTEMPTS:
            time.sleep(2 ** (attempt - 1))
    kept = f" {partial.stat().st_size:,} bytes are kept; the same command goes on." if partial.is_file() else ""
    raise UserError(
        f"{url} could not be downloaded: {problem}.{kept} Other ways: --source {'github' if url != GITHUB else 'hub'}, "
        "or --from_file with a copy from another machine."
    )


def rebuild_from_hub(partial: Path) -> None:
    """The released JSON made again from the Hub's Parquet copy."""
    import datasets

    try:
        rows = datasets.load_dataset(HUB, split="train")
    except Exception as error:  # noqa: BLE001 - network, rights, names: the hub client has many kinds
        raise UserError(
            f"{HUB} could not be loaded from the Hub: {first_line(error)}. Other ways: --source github, or "
            "--from_file with a copy from another machine."
        ) from error
    rows = [{name: row[name] for name in ("instruction", "input", "output")} for row in rows]
    partial.write_text(json.dumps(rows, indent=4), encoding="utf-8")


if __name__ == "__main__":
    run_cli({"fetch": fetch}, default="fetch")
