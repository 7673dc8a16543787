"""Writes the table of figures in docs/systems.md from the benchmarks' JSON: `python -m benchmarks.figures_table`.

Reads results/NAME.json (see `make bench`), or the files given. The row of a benchmark whose file is missing stays as it was:
it was measured by an earlier state of the code.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ecotone.schema import write_aside

ROOT = Path(__file__).resolve().parents[1]
PAGE, MARK = ROOT / "docs" / "systems.md", "<!-- figures -->"
AT_MOST, AT_LEAST, AS_FOUND = "at most", "at least", "as found"
TARGETS: dict[str, dict[str, tuple[str, float]]] = {
    "planner": {
        "oracle_mismatches": (AT_MOST, 0),
        "chain_200x16_s": (AT_MOST, 1),
        "chain_200x16_memory_gap": (AT_MOST, 0.03),
        "throughput_15dev_3kinds_s": (AT_MOST, 1),
        "baseline_over_ours_median": (AT_LEAST, 1),
    },
    "joint_planner": {
        "oracle_mismatches": (AT_MOST, 0),
        "dag_mincut_mismatches": (AT_MOST, 0),
        "large_instance_s": (AT_MOST, 30),
        "large_instance_gap": (AT_MOST, 0.05),
        "sequential_over_joint_median": (AT_LEAST, 1),
    },
    "executors": {"resnet50_best_over_eager": (AT_LEAST, 8), "resnet50_relative_error": (AT_MOST, 0.2)},
    "codec": {
        "int8_bytes_per_s": (AT_LEAST, 1e9),
        "int4_bytes_per_s": (AT_LEAST, 5e8),
        "int4_entropy_bytes_per_s": (AT_LEAST, 2e8),
        "int4_bits_per_element": (AT_MOST, 3),
        "int4_accuracy_loss_points": (AT_MOST, 0.5),
    },
    "split_latency": {
        "measured_over_bound_median": (AT_MOST, 1.10),
        "prediction_error_median": (AT_MOST, 0.10),
        "best_baseline_over_ours_min": (AT_LEAST, 0.97),
        "share_of_grid_above_1_3": (AT_LEAST, 0.33),
    },
    "wire": {
        "round_trip_over_tcp": (AT_MOST, 5),
        "throughput_over_grpc": (AT_LEAST, 0.9),
        "cpu_s_per_gigabyte": (AT_MOST, 1.5),
        "control_under_load_ms": (AT_MOST, 80),
    },
    "sim_vs_run": {"relative_error_median": (AT_MOST, 0.10)},
    "fault_simulation": {
        "scripts": (AT_LEAST, 20_000),
        "lost": (AT_MOST, 0),
        "duplicated": (AT_MOST, 0),
        "stuck": (AT_MOST, 0),
        "answered_over_possible": (AT_LEAST, 1),
        "scripts_per_s": (AT_LEAST, 100),
    },
    "generation_faults": {
        "seeds": (AT_LEAST, 4000),
        "changed": (AT_MOST, 0),
        "lost": (AT_MOST, 0),
        "stuck": (AT_MOST, 0),
        "left": (AT_MOST, 0),
    },
    "speculation_simulated": {
        "over_plain_min": (AT_LEAST, 0.95),
        "table_error_max": (AT_MOST, 0.15),
        "over_formula_min": (AT_LEAST, 0.8),
    },
    "failover": {
        "lost": (AT_MOST, 0),
        "duplicated": (AT_MOST, 0),
        "recover_s_worst": (AT_MOST, 1),
        "recover_s_active_active": (AT_MOST, 0.2),
        "overhead_fraction_passive": (AT_MOST, 0.03),
    },
    "switching": {"gap_s_p99": (AT_MOST, 0.010), "dropped": (AT_MOST, 0), "rss_growth_bytes": (AT_MOST, 20e6)},
    "dynamic_split": {
        "ours_over_best_static_stable": (AT_MOST, 1.02),
        "ours_over_best_static_changing_max": (AT_MOST, 1.0),
        "ours_over_best_static_second_best": (AT_MOST, 0.85),
        "ours_over_oracle_max": (AT_MOST, 1.15),
        "output_mismatches": (AT_MOST, 0),
    },
    "edge_prune": {"speedup_50mbit": (AT_LEAST, 3), "speedup_max": (AT_LEAST, 5.8), "cut_moves_later": (AT_LEAST, 1)},
    "dag_oracle": {
        "dag_mincut_mismatches": (AT_MOST, 0),
        "dag_order_mismatches": (AT_MOST, 0),
        "over_best_min": (AT_LEAST, 1),
        "single_tensor_over_best_max": (AT_LEAST, 1.2),
    },
    "exits": {"compute_saved_at_half_point": (AT_LEAST, 0.35), "compute_saved_at_one_point": (AT_LEAST, 0.45)},
    "bottleneck": {
        "bytes_ratio_to_int8": (AT_LEAST, 2),
        "bytes_ratio_to_jpeg": (AT_LEAST, 0),
        "accuracy_loss_points": (AT_MOST, 1),
    },
    "dyno": {
        "ours_over_best_min": (AT_LEAST, 0.97),
        "ours_over_device_only_max": (AT_LEAST, 10),
        "ours_over_float32_offloaders_max": (AT_LEAST, 4),
        "bytes_ratio_to_float32_split": (AT_LEAST, 10),
        "accuracy_loss_points": (AT_MOST, 1),
    },
    "users": {
        "local_search_loss_mean": (AT_MOST, 0.05),
        "decentralised_loss_mean": (AT_MOST, 0.10),
        "large_gap_median": (AT_MOST, 0.05),
        "contention_error_median": (AT_MOST, 0.05),
        "contention_error_max": (AT_MOST, 0.15),
    },
    "sac_d": {
        "policy_over_oracle_stationary": (AT_LEAST, 0.95),
        "policy_over_best_static_hidden": (AS_FOUND, 0),
        "deadline_hit_rate": (AS_FOUND, 0),
    },
    "mahppo": {
        "latency_saved_5_users": (AT_LEAST, 0.56),
        "energy_saved_5_users": (AT_LEAST, 0.72),
        "policy_minus_best_static": (AT_LEAST, -0.02),
        "saving_falls_with_users": (AT_LEAST, 1),
    },
    "llm_failover": {
        "tokens_lost": (AT_MOST, 0),
        "tokens_changed": (AT_MOST, 0),
        "resume_s_beyond_recompute": (AT_MOST, 2),
        "layers_recomputed_outside_lost_span": (AT_MOST, 0),
    },
    "llm_serving": {"aggregate_speedup_1_to_4": (AT_LEAST, 2), "prefix_speedup_first_token": (AT_LEAST, 5)},
    "llm_wan": {
        "speedup_over_formula_min": (AT_LEAST, 0.8),
        "speculation_speedup_best_50ms": (AT_LEAST, 3),
        "speculation_speedup_min": (AT_LEAST, 0.95),
        "greedy_mismatches": (AT_MOST, 0),
    },
    "llm_twin": {"ttft_factor_worst": (AS_FOUND, 0), "tpot_factor_worst": (AS_FOUND, 0), "order_wrong": (AS_FOUND, 0)},
    "llm_decode": {
        "decode_over_eager_torch": (AT_LEAST, 3),
        "decode4_over_llama_cpp_rpc": (AT_LEAST, 1),
        "decode8_over_llama_cpp_rpc": (AT_LEAST, 0.85),
        "prefill_over_llama_cpp_rpc": (AT_LEAST, 2.5),
        "network_added_ms_per_token": (AT_MOST, 2),
    },
    "llm_exact": {"max_logit_error_float32": (AT_MOST, 1e-3), "greedy_mismatches_float32": (AT_MOST, 0)},
    "llm_planner": {
        "oracle_mismatches": (AT_MOST, 0),
        "edgeshard_over_ours_median": (AT_LEAST, 1),
        "proportional_over_ours_median": (AT_LEAST, 1),
        "even_over_ours_median": (AT_LEAST, 1),
    },
    "openai_server": {"connections": (AT_LEAST, 10_000), "unanswered": (AT_MOST, 0), "server_us_per_token": (AS_FOUND, 0)},
    "llm_drafters": {"texts_differ": (AT_MOST, 0), "best_acceptance_greedy": (AS_FOUND, 0)},
    "soak": {
        "minutes": (AT_LEAST, 15),
        "requests": (AT_LEAST, 1),
        "lost": (AT_MOST, 0),
        "rss_growth_bytes": (AT_MOST, 20e6),
    },
}


def main(arguments: list[str]) -> int:
    """Rewrite the page from the given files, or from results/; returns 0."""
    files = [Path(a) for a in arguments] or [ROOT / "results" / f"{name}.json" for name in TARGETS]
    found = {path.stem: json.loads(path.read_text()) for path in files if path.is_file()}
    page = PAGE.read_text()
    head, _, tail = page.partition(MARK)
    write_aside(PAGE, f"{head}{MARK}\n" + "\n".join(table(found, tail)) + "\n")
    print(f"{PAGE.relative_to(ROOT)}: figures of {', '.join(found) or 'nothing'}")
    return 0


def table(found: dict[str, dict[str, Any]], former: str = "") -> list[str]:
    """The lines of the table, and what machine it was; `former`: the table before, whose other rows stay."""
    kept = {tuple(cell.strip(" `") for cell in line.split("|")[1:3]): line for line in former.splitlines() if "`" in line}
    lines = ["| benchmark | figure | measured | must reach | |", "|---|---|---|---|---|"]
    for name, targets in TARGETS.items():
        for key, (relation, limit) in targets.items():
            if name in found and found[name][key] is not None:
                value = float(found[name][key])
                met = value <= limit if relation == AT_MOST else value >= limit
                ends = (
                    f"{relation} | |"
                    if relation == AS_FOUND
                    else f"{relation} {limit:g} | {'met' if met else '**missed**'} |"
                )
                lines.append(f"| `{name}` | `{key}` | {value:.4g} | {ends}")
            elif (name, key) in kept:
                lines.append(kept[name, key])
    listed = [line.removeprefix("Machine: ").removesuffix(".") for line in former.splitlines() if "Machine: " in line]
    machines = {name for line in listed for name in line.split("; ")}
    machines |= {str(document["context"]["machine"]) for document in found.values()}
    return [*lines, "", f"Machine: {'; '.join(sorted(machines))}."]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
