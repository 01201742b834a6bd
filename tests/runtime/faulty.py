"""MAE to which something happens, once: a plug-in for the tests of faults."""

import os
import signal
import threading
import time
from pathlib import Path

from amt_ray.core.methods.mae import MAE


class Faulty(MAE):
    """MAE as it is, whose passes are written down.

    Args:
        at: ``train 9``: what happens does so in the ninth training pass of one of the processes; ``score 5``: in its
            fifth scoring pass.
        what: ``KILL``, ``TERM``, ``STOP``: the signal that the process gets; ``tell``: none.
        folder: Where the process writes its id (``struck``) just before, which makes it happen only once, and every
            process a line for each training pass (``passes``).
        pause_s: Sleep in each training pass.
    """

    def __init__(
        self, img_size, patch_size, embed_dim, depth, num_heads, decoder_embed_dim, decoder_depth, decoder_num_heads,
        mlp_ratio, norm_pix_loss, at="", what="KILL", folder="", pause_s=0.0,
    ):  # fmt: skip
        super().__init__(
            img_size, patch_size, 3, embed_dim, depth, num_heads, decoder_embed_dim, decoder_depth, decoder_num_heads,
            mlp_ratio, norm_pix_loss,
        )  # fmt: skip
        self.kind, _, number = at.partition(" ")
        self.number, self.what, self.folder, self.pause_s = int(number or 0), what, Path(folder), pause_s
        self.seen = {"train": 0, "score": 0}

    def embed(self, patches_BNP, keep_BV=None, *others):
        kind = "score" if keep_BV is None else "train"
        if not patches_BNP.is_meta and self.kind and (kind == "score" or self.training):
            self.seen[kind] += 1
            self.written_down(kind)
            if kind == self.kind and self.seen[kind] == self.number:
                self.strike()
        return super().embed(patches_BNP, keep_BV, *others)

    def written_down(self, kind):
        if kind == "train":
            time.sleep(self.pause_s)
            with open(self.folder / "passes", "a") as file:
                file.write(f"{time.time()} {os.getpid()}\n")

    def strike(self):
        """Only the first process of all is struck."""
        try:
            with open(self.folder / "struck", "x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return
        if self.what != "tell":
            os.kill(os.getpid(), signal.Signals[f"SIG{self.what}"])


def passes(folder):
    """Time and process of each training pass of any worker."""
    lines = (folder / "passes").read_text().splitlines() if (folder / "passes").exists() else []
    return [(float(moment), int(pid)) for moment, pid in map(str.split, lines)]


def recovery(folder):
    """What it took from the fault to the first training pass of a process that is new, in words."""
    struck = (folder / "struck").stat().st_mtime
    before = {pid for moment, pid in passes(folder) if moment <= struck}
    again = [moment for moment, pid in passes(folder) if pid not in before]
    if not again:
        return "no new process"
    return f"{min(again) - struck:.1f} s from the fault to the next step of a new process"


def when_struck(folder, act):
    """In the background, do something to the process that was struck, as soon as it is."""

    def wait():
        for _ in range(1200):
            if (folder / "struck").exists() and (pid := (folder / "struck").read_text()):
                act(int(pid))
                return
            time.sleep(0.1)

    watcher = threading.Thread(target=wait, daemon=True)
    watcher.start()
    return watcher
