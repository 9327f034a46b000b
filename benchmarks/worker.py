"""One peer in a process of its own, driven by JSON lines: requests on stdin, answers on stdout.

Two libraries in one process would compete for the cores with two pools of threads.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings


def main() -> None:
    peer, threads = sys.argv[1], int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    warnings.filterwarnings("ignore")
    if peer == "hf":
        import torch

        torch.set_num_threads(threads)
    from peers import PEERS
    from problem import Problem

    prepared = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "prepare":
                prepared = None
                problem = Problem(**request["problem"])
                prepared = PEERS[peer](problem, request["beam"], request["part"])
                began = time.perf_counter()
                prepared.run(0)
                answer = {**prepared.about, "first_run_s": time.perf_counter() - began}
            elif request["do"] == "find":
                found = prepared.found(request["number"])
                scores = None if found.scores is None else found.scores.tolist()
                answer = {"tokens": found.tokens.tolist(), "scores": scores}
            else:
                began, cpu = time.perf_counter(), time.process_time()
                prepared.run(request["number"])
                answer = {
                    "seconds": time.perf_counter() - began,
                    "cpu_seconds": time.process_time() - cpu,
                }
        except (ValueError, MemoryError) as error:
            answer = {"error": str(error) or type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
