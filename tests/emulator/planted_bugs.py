"""The planted bugs: changes of csrc/device, each of which some stage of the emulator must catch.

(Own rows polled in place of a peer's is none of them: an inbox has no area of its own rank. The two
nearest are areas polled in another order, and the own row added in place of a peer's.)

An edit names a file, a text that must be in it exactly once, and what to put in its place. So the
list cannot rot unseen: where the kernels change, an edit that no longer fits fails. To add one,
append a Bug and run `mutations.py NAME`; to find out who catches it, `mutations.py --table NAME`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    file: str  # in csrc/device
    old: str
    new: str


@dataclass(frozen=True)
class Bug:
    name: str
    edits: tuple[Edit, ...]
    caught_by: tuple[str, ...] = ("fuzz",)  # stages that must find it
    dtype: str = "bf16"  # the only one that is built
    base: int = 0  # the first seed
    times: int = 1  # as many cases as usual, for a bug that few cases meet


def bug(name: str, file: str, old: str, new: str, caught_by: str = "fuzz", dtype: str = "bf16"):
    return Bug(name, (Edit(file, old, new),), tuple(caught_by.split()), dtype)


EXCHANGE, ONE_SHOT, ROW_NORM, PACK = "exchange.cuh", "one_shot.cuh", "row_norm.cuh", "pack.cuh"
CLEAR = "if (norm.in_row(j) && !call.broken) clear_all<kRanks>(exchange, offset);"
BEGIN = "  Call call = begin_call(exchange);\n"
FIRST_FENCE = "    order_calls(team.first_row(), team.pack(0));\n"
SECOND_FENCE = "        order_calls(row, team.pack(j));\n"
AFTER_PUSHES = "  } else {\n    join_failure();\n"
WAIT = "  grid_dependency_wait(norm.x_address(team.first_row(), 0),"

BUGS = (
    # ---- stages and clears ----
    bug(
        "single stage",
        EXCHANGE,
        "return number % kStages != 0 ? exchange.stage_bytes : 0;",
        "return 0 * exchange.stage_bytes;",
        "explore",
    ),
    bug("no clear", ONE_SHOT, CLEAR, ""),
    bug(
        "clear before the value is read",
        ONE_SHOT,
        "if (all_full<kRanks>(from)) break;",
        "if (all_full<kRanks>(from)) {\n"
        "clear_all<kRanks>(exchange, offset);\n"
        "load_all<kRanks>(exchange, offset, from);\nbreak;\n}",
    ),
    bug(
        "clear in the other stage",
        ONE_SHOT,
        CLEAR,
        CLEAR.replace(
            "offset)", "offset + exchange.stage_bytes - 2 * call.stage_offset(exchange))"
        ),
    ),
    bug(
        "the last source is not cleared",
        EXCHANGE,
        "store_relaxed_sys(reinterpret_cast<Pack*>(exchange.peer[area].poll + offset), "
        "empty_pack());",
        "if (area == 0)\nstore_relaxed_sys("
        "reinterpret_cast<Pack*>(exchange.peer[area].poll + offset), empty_pack());",
    ),
    bug(
        "one word is not cleared",
        PACK,
        "return {kEmptyWord, kEmptyWord, kEmptyWord, kEmptyWord};",
        "return {kEmptyWord, kEmptyWord, 0, kEmptyWord};",
    ),
    # ---- the mark ----
    bug(
        "one word of the pack tested",
        PACK,
        "return (p.x != kEmptyWord) & (p.y != kEmptyWord) & "
        "(p.z != kEmptyWord) & (p.w != kEmptyWord);",
        "return p.w != kEmptyWord;",
    ),
    bug("three words of the pack tested", PACK, " & (p.z != kEmptyWord) &", " &"),
    bug("the empty word is sent", PACK, "w == kEmptyWord ? kOtherNanWord : w", "w"),
    bug(
        "the empty word is sent as a number",
        PACK,
        "kOtherNanWord = 0x7fffffffu",
        "kOtherNanWord = 0u",
    ),
    # ---- the call number ----
    Bug(
        "call number read before the PDL wait",
        (Edit(ONE_SHOT, BEGIN, ""), Edit(ONE_SHOT, WAIT, BEGIN + WAIT)),
    ),
    bug("idle copies are not advanced", ONE_SHOT, "advance_idle_copies(exchange, call);", ""),
    bug("the own copy is not advanced", ONE_SHOT, "advance_own_copy(exchange, call);  // 5.", ""),
    bug(
        "all blocks read copy 0",
        EXCHANGE,
        "reinterpret_cast<const uint2*>(own_copy(exchange))",
        "reinterpret_cast<const uint2*>(&header_of(exchange.inbox)->call[0])",
        "fuzz",
    ),
    bug(
        "the own copy is advanced before all have read it",
        ONE_SHOT,
        "advance_idle_copies(exchange, call);",
        "advance_idle_copies(exchange, call);\nadvance_own_copy(exchange, call);",
        "weak",
    ),
    bug(
        "copies beyond the second round are not advanced",
        EXCHANGE,
        "i += gridDim.x * blockDim.x",
        "i += kMaxBlocks",
    ),
    # ---- programmatic dependent launch ----
    Bug(
        "inputs read before the PDL wait",
        (
            Edit(ONE_SHOT, WAIT, "fetch(team.first_row(), 0);\n" + WAIT),
            Edit(ONE_SHOT, "  if (kOnePack) fetch(team.first_row(), 0);\n", ""),
            Edit(
                ONE_SHOT,
                "  start_team(team, segments);\n",
                "  start_team(team, segments);\n  Pack own;\n"
                "  const auto fetch = [&](uint32_t row, uint32_t j) {\n"
                "    if (!norm.in_row(j)) return;\n    own = norm.load_x(row, j);\n"
                "    norm.expect(row, j);\n    norm.expect_weight(j);\n  };\n",
            ),
            Edit(
                ONE_SHOT,
                "  Pack own;\n  const auto fetch = [&](uint32_t row, uint32_t j) {\n"
                "    if (!norm.in_row(j)) return;\n    own = norm.load_x(row, j);\n"
                "    norm.expect(row, j);\n    if (kWeightEarly) norm.expect_weight(j);\n  };\n",
                "",
            ),
        ),
        ("weak",),
    ),
    Bug(
        "the weight read before the PDL wait",
        (
            Edit(ONE_SHOT, WAIT, "  norm.expect_weight(0);\n" + WAIT),
            Edit(
                ONE_SHOT,
                "if (kWeightEarly) norm.expect_weight(j);",
                "if (row != team.first_row()) norm.expect_weight(j);",
            ),
        ),
    ),
    bug("no PDL wait", ONE_SHOT, WAIT, "if (rows.rows == 0)\n" + WAIT),
    bug(
        "no PDL wait in the local kernel",
        "local_norm.cuh",
        WAIT,
        "if (rows.rows == 0)\n" + WAIT,
        "weak",
    ),
    # ---- GAN_STRICT_ORDER ----
    bug("no fence before the pushes", ONE_SHOT, FIRST_FENCE, "", "strict"),
    bug("no fence after the polls", ONE_SHOT, SECOND_FENCE, "", "strict"),
    Bug(
        "the fence before the pushes comes after them",
        (
            Edit(ONE_SHOT, FIRST_FENCE, ""),
            Edit(ONE_SHOT, AFTER_PUSHES, FIRST_FENCE + AFTER_PUSHES),
        ),
        ("strict",),
    ),
    # ---- rows of the ranks ----
    bug(
        "areas polled in another order",
        EXCHANGE,
        "from[area] = load_relaxed_sys(reinterpret_cast<const Pack*>(exchange.peer[area].poll",
        "from[area] = load_relaxed_sys(reinterpret_cast<const Pack*>("
        "exchange.peer[kRanks - 2 - area].poll",
        dtype="fp32",
    ),
    bug("not added in rank order", ONE_SHOT, "pack_of(r));", "pack_of(kRanks - r));", dtype="fp32"),
    bug(
        "own row added in place of a peer's",
        ONE_SHOT,
        "return r == rank ? own",
        "return r == 0 ? own",
    ),
    bug(
        "the rows of a team after the first are not pushed",
        ONE_SHOT,
        "(kOnePack ? team.row_step() : 0); row < rows.rows;",
        "(kOnePack ? rows.rows : 0); row < rows.rows;",
    ),
    # ---- the sums over a team ----
    bug("no sync in the block sum", ROW_NORM, "      block_sync();\n", "", "weak tsan"),
    Bug(
        "one reduction buffer",
        (
            Edit(
                ROW_NORM,
                "float* own = &sums_.sum[buffer][team_.segment(j)];",
                "float* own = &sums_.sum[0][team_.segment(j)];",
            ),
            Edit(ROW_NORM, "sum_of_segments(sums_.sum[buffer],", "sum_of_segments(sums_.sum[0],"),
        ),
    ),
    bug("wrong phase of the byte counters", ROW_NORM, "reductions_ / 2 % 2);", "reductions_ % 2);"),
    bug("no wait for the team's start", ROW_NORM, "  cluster_start();\n", ""),
    bug(
        "segments added in another order",
        ROW_NORM,
        "sum = add_rn(sum, segment[s]);",
        "sum = add_rn(sum, segment[segments % kWarpLanes != 0 ? s : "
        "segments - kWarpLanes - s + 2 * (s % kWarpLanes)]);",
        "full",
        "fp32",
    ),
    bug(
        "packs beyond the row",
        ROW_NORM,
        "return team_.pack(j) < params_.row_packs; }",
        "return team_.pack(j) <= params_.row_packs; }",
    ),
    bug(
        "norm_out is written a row further on",
        ROW_NORM,
        "store_pack(params_.norm_out, row, j,",
        "store_pack(params_.norm_out, row + 1, j,",
    ),
    # ---- arithmetic ----
    bug(
        "squares contracted to FMA",
        ROW_NORM,
        "sum = add_rn(sum, mul_rn(f.at[i], f.at[i]));",
        "sum = fma_rn(f.at[i], f.at[i], sum);",
        dtype="fp32",
    ),
    bug(
        "weight and rstd multiplied first",
        ROW_NORM,
        "mul_rn(mul_rn(f.at[i], rstd), scale.at[i])",
        "mul_rn(f.at[i], mul_rn(rstd, scale.at[i]))",
        dtype="fp32",
    ),
    # ---- deadline and failure ----
    bug(
        "the deadline never fires",
        EXCHANGE,
        "if (static_cast<int32_t>(now - deadline_) < 0) return false;",
        "return false;",
        "faults",
    ),
    bug(
        "the deadline fires at the first look",
        EXCHANGE,
        "deadline_ = (now + exchange.timeout_ticks) | 1u;",
        "deadline_ = now | 1u;",
        "faults",
    ),
    bug(
        "the failed flag is not looked at",
        EXCHANGE,
        "return {copy.x, copy.y != 0};",
        "return {copy.x, false};",
        "faults",
    ),
    bug(
        "the failed flag is in one copy only",
        EXCHANGE,
        "for (uint32_t i = 0; i < kMaxBlocks; ++i) store_relaxed_gpu(&own->call[i].failed, 1u);",
        "store_relaxed_gpu(&own->call[0].failed, 1u);",
        "faults",
    ),
    bug(
        "pushes go on after a failure",
        ONE_SHOT,
        "  // 1.\n  if (!call.broken) {",
        "  // 1.\n  if (true) {",
        "faults",
    ),
    bug(
        "clears go on after a failure",
        ONE_SHOT,
        CLEAR,
        CLEAR.replace(" && !call.broken", ""),
        "faults",
    ),
    bug(
        "the failure is not reported to peers",
        EXCHANGE,
        "    store_relaxed_sys(&header_of(exchange.peer_inbox[r])->board",
        "    if (r == exchange.rank)\n"
        "    store_relaxed_sys(&header_of(exchange.peer_inbox[r])->board",
        "faults",
    ),
    bug(
        "the failure is not reported to the host",
        EXCHANGE,
        "  store_relaxed_sys(exchange.host_failure, record);\n",
        "",
        "faults",
    ),
    bug(
        "the board is not looked at",
        EXCHANGE,
        "uint64_t record = reported_failure<kRanks>(exchange);",
        "uint64_t record = 0;",
        "faults",
    ),
    bug(
        "the report names the area, not the rank",
        EXCHANGE,
        "return source_of_area(area, exchange.rank);",
        "return area;",
        "faults",
    ),
    bug(
        "several threads report, each its own",
        EXCHANGE,
        "if (!claim_once(&own->failure_claim)) return;",
        "claim_once(&own->failure_claim);",
        "faults",
    ),
    bug(
        "a failure is claimed where there is none",
        ONE_SHOT,
        "advance_own_copy(exchange, call);  // 5.",
        "advance_own_copy(exchange, call);\n"
        "store_relaxed_gpu(&header_of(exchange.inbox)->failure_claim, 1u);",
    ),
    bug(
        "rows half done are left so",
        ONE_SHOT,
        "      norm.spoil(row);\n",
        "",
        "faults",
    ),
    bug(
        "a row is taken for whole by those who have their packs",
        ONE_SHOT,
        "if (GAN_UNLIKELY(has_nan) && has_failed(exchange)) {",
        "if (call.broken) {",
        "faults",
    ),
    Bug(
        "a failed flag is seen without the claim",
        (
            Edit(
                EXCHANGE,
                "  fence_gpu();  // whoever sees a failed flag, below, sees the claim\n",
                "",
            ),
        ),
        ("faults",),
        base=600,
        times=4,
    ),
    bug(
        "NaN is added without the claim",
        EXCHANGE,
        "join_failure() { fence_gpu(); }",
        "join_failure() {}",
        "faults",
    ),
    bug(
        "the lanes of a warp do not meet before their sum is sent",
        ROW_NORM,
        "      warp_sync();  // with the sum goes what all lanes have done\n",
        "",
        "faults",
    ),
)

# Every stage must pass the kernels as they are, built in the same way.
CONTROL = Bug("no bug", (), ("fuzz", "weak", "strict", "faults", "tsan", "asan", "full"))
