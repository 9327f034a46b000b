"""One peer in a process of its own, driven by JSON lines: requests on stdin, answers on stdout.

Two libraries in one process would compete for the cores with two pools of threads, and for the
memory of a GPU with two allocators.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings


def main() -> None:
    peer, threads, device = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    warnings.filterwarnings("ignore")
    if peer == "hf":
        import torch

        torch.set_num_threads(threads)
        # float32 is float32 on both sides; XLA has JAX_DEFAULT_MATMUL_PRECISION=highest.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    from peers import PEERS
    from problem import Problem

    prepared = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "prepare":
                prepared = None
                problem = Problem(**request["problem"])
                prepared = PEERS[peer](problem, request["beam"], request["part"], device)
                began = time.perf_counter()
                prepared.run(0)
                answer = {**prepared.about, "first_run_s": time.perf_counter() - began}
                answer["memory"] = prepared.memory()
            elif request["do"] == "find":
                found = prepared.found(request["number"])
                scores = None if found.scores is None else found.scores.tolist()
                answer = {"tokens": found.tokens.tolist(), "scores": scores}
            else:
                number, runs = request["number"], request.get("runs", 1)
                began, cpu = time.perf_counter(), time.process_time()
                for run in range(runs):  # each is waited for, as a server waits for its answer
                    prepared.run(number * runs + run)
                answer = {
                    "seconds": (time.perf_counter() - began) / runs,
                    "cpu_seconds": (time.process_time() - cpu) / runs,
                }
        except ValueError as error:
            answer = {"error": str(error)}
        except Exception as error:  # a full device, or another version of a peer's library
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__} {str(error)[:200]}".replace("\n", " ")}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
