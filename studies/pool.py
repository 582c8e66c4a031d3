"""
Runs commands side by side, skips those that are done, and shows the time left.

A chain is a list of jobs that run one after another; chains run side by side. Each job gets one
thread, so a figure does not depend on how many run at once. What is done is written to a file, a
command a line, so the same study started again goes on where it was stopped.
"""
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from support.common import UserError

ROOT = Path(__file__).parent.parent


@dataclass
class Job:
    """One command: its arguments behind `python`, about how long it takes, where it logs."""
    args: list
    seconds: int
    what: str
    log: Path

    @property
    def line(self):
        return shlex.join(map(str, self.args))


class Pool:
    def __init__(self, folder, at_once, plan):
        """plan: all jobs of the study as far as they are known, for the time left."""
        self.folder, self.at_once, self.plan = Path(folder), at_once, plan
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "done"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.done, self.before = set(lines), set(lines)
        self.began, self.lock, self.running, self.failed = time.time(), threading.Lock(), set(), []
        signal.signal(signal.SIGTERM, lambda *_: self.stop(143))

    def stop(self, code):
        """Who stops the study stops its runs."""
        for process in self.running:
            process.kill()
        os._exit(code)

    def run(self, chains):
        """Runs all chains. Raises UserError where a job failed: the same command goes on."""
        with ThreadPoolExecutor(self.at_once) as threads:
            waiting = [threads.submit(self.run_chain, chain) for chain in chains]
            try:
                for future in waiting:
                    future.result()
            except KeyboardInterrupt:
                self.stop(130)
        if self.failed:
            raise UserError(f"{self.failed[0]}; the same command goes on from here")

    def run_chain(self, chain):
        for job in chain:
            if job.line in self.done:
                continue
            if self.failed or not self.run_job(job):
                return

    def run_job(self, job):
        job.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(job.log, "a") as log:
            process = subprocess.Popen([sys.executable, *map(str, job.args)], stdout=log,
                                       stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
            self.running.add(process)
            code = process.wait()
            self.running.discard(process)
        with self.lock:
            if code:
                last = (job.log.read_text().splitlines() or ["no output"])[-1]
                self.failed.append(f"{job.what}: {last} (all of it: {job.log})")
                return False
            self.done.add(job.line)
            with open(self.file, "a") as file:
                file.write(job.line + "\n")
            self.show(job)
        return True

    def show(self, job):
        left = sum(j.seconds for j in self.plan if j.line not in self.done)
        new = sum(j.seconds for j in self.plan if j.line in self.done - self.before)
        total = max(1, sum(j.seconds for j in self.plan))
        minutes = (time.time() - self.began) * left / max(1, new) / 60
        print(f"{100 - 100 * left // total:3d} %  {job.what:60}  about {minutes + 1:.0f} min left",
              flush=True)
