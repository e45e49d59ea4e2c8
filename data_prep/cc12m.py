"""CC12M (and CC3M): downloads the published list of addresses and captions into shards.

python data_prep/cc12m.py --table cc12m.tsv --out data/cc12m --workers 64 --max_side 512

The table has an address and a caption a line, in either order, without a header. Each address is tried a few times;
what fails is counted by reason and left out: a part of the list is always gone. Stopped at any moment and started again,
it goes on with the first unfinished shard of 1,000. Of the 12.4 million rows expect a share to be missing, and 1 to 2 TB
at full size, a tenth of it with --max_side 256.
The lists are Google's (free use with acknowledgement); the pictures belong to their owners.
"""

import contextlib
import gzip
import http.client
import math
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from common import cli
from data_prep._write import BadSample, checked_image, prepare, settings, summary


@dataclass(frozen=True)
class Config:
    table: str  # tsv, also .gz: address and caption a line
    out: str  # folder to write
    workers: int = 32  # downloads at a time
    retries: int = 2  # further tries after a time-out or a server error
    timeout: float = 10.0  # seconds for one try, whole download included
    max_mb: float = 20.0  # larger files are left out
    min_side: int = 16  # smaller pictures are left out (placeholders, tracking pixels)
    max_side: int = 0  # larger images shrink to this many pixels, 0 = keep the original bytes
    limit: int = 0  # first so many rows only, 0 = all


def read_table(path, limit) -> list[tuple[int, str, str]]:
    """(row, address, caption); rows without an http(s) address are an error of the whole file only if all are."""
    rows = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if str(path).endswith(".gz") else open(path, encoding="utf-8") as f:
            for number, line in enumerate(f):
                if limit and len(rows) >= limit:
                    break
                parts = line.rstrip("\n").split("\t")
                url = next((p for p in parts if p.startswith(("http://", "https://"))), None)
                if len(parts) >= 2 and url is not None:
                    rows.append((number, url, next(p for p in parts if p != url or parts.count(url) > 1)))
    except FileNotFoundError:
        raise ValueError(f"table {path} does not exist") from None
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"table {path} is not UTF-8 text: {error}") from error
    if not rows:
        raise ValueError(f"table {path} has no line with an http address and a caption, separated by a tab")
    return rows


class Head:
    """A connection that waits `timeout` seconds for the head of the answer: a socket's own limit is for each packet, so that a
    server which sends a byte now and then would hold up its whole shard."""

    def getresponse(self):
        late, held = threading.Event(), self.sock

        def cut():
            late.set()
            with contextlib.suppress(OSError):  # it may be closed already
                held.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self.timeout, cut)
        timer.start()
        try:
            return super().getresponse()
        finally:
            timer.cancel()
            if late.is_set():
                raise TimeoutError


class Plain(Head, http.client.HTTPConnection):
    pass


class Secure(Head, http.client.HTTPSConnection):
    pass


class Http(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(Plain, request)


class Https(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(Secure, request)


class Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, new):
        if not new.startswith(("http://", "https://")):
            raise urllib.error.HTTPError(new, code, "redirect to another scheme", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, new)


def download(url: str, cfg: Config) -> bytes:
    """One address -> bytes, or BadSample whose kind is the reason."""
    agent = {"User-Agent": "Mozilla/5.0 (compatible; dataset preparation)"}
    for attempt in range(max(0, cfg.retries) + 1):
        if attempt:
            time.sleep(min(8.0, 0.5 * 2**attempt))
        began, parts, size = time.monotonic(), [], 0
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=agent), timeout=cfg.timeout) as answer:
                while part := answer.read1(1 << 16):
                    parts.append(part)
                    size += len(part)
                    if size > cfg.max_mb * 2**20:
                        raise BadSample(f"{url}: larger than {cfg.max_mb} MB", "too large")
                    if time.monotonic() - began > cfg.timeout:  # the socket's limit is per packet only
                        raise TimeoutError
                expected = answer.headers.get("Content-Length")
                if expected and expected.isdigit() and size < int(expected):
                    raise http.client.IncompleteRead(b"", int(expected) - size)
            return b"".join(parts)
        except urllib.error.HTTPError as error:
            problem = BadSample(f"{url}: HTTP {error.code}", f"HTTP {error.code}")
            if error.code < 500 and error.code != 429:
                raise problem from None  # gone is gone
        except TimeoutError:
            problem = BadSample(f"{url}: no answer within {cfg.timeout} s", "timed out")
        except http.client.IncompleteRead:
            problem = BadSample(f"{url}: connection closed early", "cut short")
        except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:  # the last: a port like 10^20
            if isinstance(error, BadSample):
                raise
            timed_out = isinstance(getattr(error, "reason", None), TimeoutError)
            problem = BadSample(f"{url}: {error}", "timed out" if timed_out else "no connection")
    raise problem


def run(cfg: Config) -> dict:
    cli.within(cfg, "workers", 1)
    cli.within(cfg, "limit", 0)
    if not 0 < cfg.timeout < math.inf:
        raise ValueError(f"--timeout {cfg.timeout} must be a number of seconds above 0")
    urllib.request.install_opener(urllib.request.build_opener(Redirects, Http, Https))

    def make(item):
        row, url, caption = item
        ext, blob = checked_image(download(url, cfg), url, cfg.max_side, cfg.min_side)
        return str(row), ext, blob, {"captions": [caption], "source": url}

    rows = read_table(cfg.table, cfg.limit)
    with ThreadPoolExecutor(cfg.workers) as pool:
        try:
            manifest = prepare(cfg.out, {"train": rows}, make, mapper=pool.map, source=Path(cfg.table).name,
                               identity=settings(cfg, ("out", "workers", "retries", "timeout")),
                               licence="list: Google, free use; pictures: their owners")  # fmt: skip
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    summary(cfg.out, manifest)
    return manifest


if __name__ == "__main__":
    cli.main(run, Config)
