"""Training and the forward pass on a CPU compared with PyTorch's, in alternation.

    python -m benchmarks.cpu [--networks cifar10 digits] [--rounds 5] [--before CHECKOUT]

In each round a network is timed in processes of their own, one after the other: ours as it was in
an older checkout, by its own `benchmarks.cpu`; ours; and PyTorch's, all on the same threads. The
table has the medians over the rounds, and the medians of the rounds' quotients. Needs PyTorch.
`--job NAME` times ours once, without PyTorch.
"""

import json
import pathlib
import statistics
from typing import Any

from ml_collections import ConfigDict

from benchmarks import train
from benchmarks.measure import Table, get_parser, rows_of
from configs.vp import cifar10_st, digits_st

_HERE = pathlib.Path(__file__).resolve().parent.parent
# name: (recipe, fields of its network)
_NETWORKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "cifar10": (cifar10_st, {"nf": 32, "num_res_blocks": 1}),
    "cifar10_wide": (cifar10_st, {"nf": 64, "num_res_blocks": 1}),
    "digits": (digits_st, {"ch_mult": (1, 1)}),  # of today, for older checkouts too
}


def _config(name: str) -> ConfigDict:
    recipe, fields = _NETWORKS[name]
    config = recipe.get_config()
    config.model.update(dtype="float32", **fields)
    config.training.batch_size = 64
    return config


def main() -> None:
    """Measure all networks, and print the table."""
    parser = get_parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=_NETWORKS, default=list(_NETWORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=pathlib.Path, help="an older checkout")
    parser.add_argument("--job", choices=_NETWORKS, help="time ours alone, once")
    flags = parser.parse_args()
    if flags.job:
        print(json.dumps(list(train.ours(_config(flags.job)))))
        return
    checkouts = {"before": flags.before, "ours": _HERE} if flags.before else {"ours": _HERE}
    columns = [f"{side}, ms" for side in (*checkouts, "PyTorch")]
    table = Table("network", "", *columns, *(f"{side} / PyTorch" for side in checkouts))
    for name in flags.networks:
        times: dict[str, list[list[float]]] = {}
        for _ in range(flags.rounds):
            sides = [rows_of("benchmarks.cpu", "--job", name, cwd=x) for x in checkouts.values()]
            sides.append(list(train.peer(_config(name), "torch")))
            for rows in zip(*sides, strict=True):
                what = rows[-2][""].split(",")[0]
                times.setdefault(what, []).append([row["seconds"] * 1e3 for row in rows])
                print(name, what, *(f"{ms:.1f}" for ms in times[what][-1]), flush=True)
        for what, rounds in times.items():
            medians = [statistics.median(side) for side in zip(*rounds, strict=True)]
            quotients = [
                statistics.median(round_[i] / round_[-1] for round_ in rounds)
                for i in range(len(checkouts))
            ]
            table.add(name, what, *medians, *(f"{value:.2f}" for value in quotients))
    table.show()


if __name__ == "__main__":
    main()
