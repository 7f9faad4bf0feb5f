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


def with_params(wrong: str) -> tuple[str, str]:
    """An edit of two_shot.cuh, as if its parameters were wrong."""
    given = "const TwoShotParams& two_shot = params.two_shot;"
    return given, f"TwoShotParams two_shot = params.two_shot;\ntwo_shot.{wrong};"


def bug(name: str, file: str, old: str, new: str, caught_by: str = "fuzz", dtype: str = "bf16"):
    return Bug(name, (Edit(file, old, new),), tuple(caught_by.split()), dtype)


EXCHANGE, INBOX, PACK, ROW_NORM = "exchange.cuh", "inbox.h", "pack.cuh", "row_norm.cuh"
ONE_SHOT, TWO_SHOT, DEBUG_MODE = "one_shot.cuh", "two_shot.cuh", "debug_mode.cuh"
# Of one_shot.
CLEAR = "if (norm.in_row(j) && !call.broken) clear_all<kRanks>(exchange, offset);"
BEGIN = "  Call call = begin_call(exchange);\n"
FIRST_FENCE = "    order_calls(team.first_row(), team.pack(0));\n"
SECOND_FENCE = "        order_calls(row, team.pack(j));\n"
AFTER_PUSHES = "  } else {\n    join_failure();\n"
# Of two_shot.
CLEAR_SUM = "if (norm.in_row(j) && !is_here && !call.broken) clear_one(exchange, area, offset);"
KEEP = "keep_first_clear_rest<kRanks>(exchange, offset, keeps_here ? empty_pack() : sendable(sum));"
HOP = "hop_bytes = two_shot_hop({}, two_shot.slice_strips, kRanks - 1)"
CLEAR_ALL = "clear_all<kRanks>(exchange, offset);"
ADVANCE_IDLE = "  advance_idle_copies(exchange, call);\n"
ADVANCE_OWN = "  advance_own_copy(exchange, call);  // 4.\n"
FENCE = "      order_calls(row_at(i), team.pack(j));\n"
TO_ONE = "exchange.push[distance - 1] + offset), sendable(own));"
SENT = "sendable(own)", "own"
# Of both.
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
        "for (uint32_t area = 0; area < kRanks - 1; ++area) clear_one(exchange, area, offset);",
        "clear_one(exchange, 0, offset);",
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
        "return larger(larger(p.x, p.y), larger(p.z, p.w));",
        "return p.w;",
    ),
    bug("three words of the pack tested", PACK, "larger(p.z, p.w));", "p.w);"),
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
            Edit(
                ONE_SHOT,
                WAIT,
                "Pack early;\nif (norm.in_row(0)) early = norm.load_x(team.first_row(), 0);\n"
                + WAIT,
            ),
            Edit(
                ONE_SHOT,
                "  if (kOnePack) fetch(team.first_row(), 0);\n",
                "  if (kOnePack) fetch(team.first_row(), 0);\n  own = early;\n",
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
        "from[area] = load_relaxed_sys(poll_address(exchange, area, offset));",
        "from[area] = load_relaxed_sys(poll_address(exchange, kRanks - 2 - area, offset));",
        dtype="fp32",
    ),
    bug("not added in rank order", EXCHANGE, "pack_of(r));", "pack_of(kRanks - r));", dtype="fp32"),
    bug(
        "own row added in place of a peer's",
        EXCHANGE,
        "return r == rank ? own",
        "return r == 0 ? own",
    ),
    bug(
        "the rows of a team after the first are not pushed",
        ONE_SHOT,
        "(kOnePack ? team.row_step() : 0); row < rows.rows;",
        "(kOnePack ? rows.rows : 0); row < rows.rows;",
    ),
    bug(
        "areas overlap",
        INBOX,
        "index / kStripPacks) * areas * kStripBytes",
        "index / kStripPacks) * (areas == 1 ? 1 : areas - 1) * kStripBytes",
    ),
    # ---- two-shot: who owns what ----
    bug(
        "two-shot: packs are pushed to the owner's neighbour",
        TWO_SHOT,
        "(owner_of(place, i) + kRanks - exchange.rank) % kRanks;",
        "(owner_of(place, i) + 1 + kRanks - exchange.rank) % kRanks;",
    ),
    bug(
        "two-shot: owners do not change in turn where they are pushed to",
        TWO_SHOT,
        "(owner_of(place, i) + kRanks",
        "(owner_of(place, 0) + kRanks",
    ),
    bug(
        "two-shot: owners do not change in turn where they add",
        TWO_SHOT,
        "owner_of(place, i) != exchange.rank",
        "owner_of(place, 0) != exchange.rank",
    ),
    bug(
        "two-shot: owners do not change in turn where their sums are polled",
        TWO_SHOT,
        "const uint32_t owner = owner_of(place, i);",
        "const uint32_t owner = owner_of(place, 0);",
    ),
    bug(
        "two-shot: own packs are pushed too",
        TWO_SHOT,
        "if (distance == 0) continue;",
        "if (distance == 0) {\n"
        "push_to_one(exchange, 1, slot(i, place), norm.load_x(row_at(i), j));\ncontinue;\n}",
    ),
    bug(
        "two-shot: slices begin where others end",
        INBOX,
        "return (ranks * (pack + 1) - 1) / row_packs;",
        "return ranks * pack / row_packs;",
    ),
    # ---- two-shot: places ----
    bug(
        "two-shot: sums are pushed to the first hop's places",
        TWO_SHOT,
        "offset + two_shot.hop_bytes, sum);",
        "offset, sum);",
    ),
    bug(
        "two-shot: both hops have the same places",
        TWO_SHOT,
        *with_params("hop_bytes = 0"),
    ),
    bug(
        "two-shot: the second hop's places begin behind the first rows of the teams",
        TWO_SHOT,
        *with_params(HOP.format("team.row_step()")),
    ),
    bug(
        "two-shot: the second hop's places begin a row further on",
        TWO_SHOT,
        *with_params(HOP.format("rows.rows + 1")),
    ),
    bug(
        "two-shot: no gap between the hops, so that one_shot fills the same places",
        TWO_SHOT,
        *with_params("hop_bytes -= kTwoShotGapBytes * (kRanks - 1)"),
        "mixed",
    ),
    bug(
        "two-shot: slices are as long as the shortest",
        TWO_SHOT,
        *with_params("slice_strips = rows.row_packs / kRanks / kStripPacks"),
    ),
    bug(
        "two-shot: sums are polled in another area",
        TWO_SHOT,
        "is_own ? 0 : area_of_source(owner, exchange.rank);",
        "is_own ? 0 : kRanks - 2 - area_of_source(owner, exchange.rank);",
    ),
    bug("two-shot: the own sum is not kept", TWO_SHOT, KEEP, CLEAR_ALL),
    # ---- two-shot: clears ----
    bug("two-shot: nothing is cleared after the second hop", TWO_SHOT, CLEAR_SUM, ""),
    bug(
        "two-shot: the own sum is not cleared",
        TWO_SHOT,
        CLEAR_SUM,
        CLEAR_SUM.replace("if (", "if (!is_own && "),
        "explore",
    ),
    bug(
        "two-shot: peers' sums are not cleared",
        TWO_SHOT,
        CLEAR_SUM,
        CLEAR_SUM.replace("if (", "if (is_own && "),
        "explore",
    ),
    bug(
        "two-shot: an owner clears nothing but the first area",
        EXCHANGE,
        "for (uint32_t area = 1; area < kRanks - 1; ++area) clear_one(exchange, area, offset);",
        "for (uint32_t area = 1; area < 1; ++area) clear_one(exchange, area, offset);",
    ),
    bug(
        "two-shot: the owner clears nothing where a team has one row",
        TWO_SHOT,
        KEEP,
        "if (!keeps_here) " + KEEP,
        "explore",
    ),
    bug(
        "two-shot: the owner leaves its sum where a team has one row",
        TWO_SHOT,
        KEEP,
        KEEP.replace("keeps_here ? empty_pack() : ", ""),
        "explore",
    ),
    # ---- two-shot: sums ----
    bug(
        "two-shot: the empty word is kept",
        TWO_SHOT,
        KEEP,
        KEEP.replace("sendable(sum)", "sum"),
        dtype="fp32",
    ),
    bug("two-shot: the empty word is sent to an owner", EXCHANGE, TO_ONE, TO_ONE.replace(*SENT)),
    bug(
        "two-shot: a sum is made when the first peer's pack is there",
        TWO_SHOT,
        "if (all_full<kRanks>(from)) break;",
        "if (is_full(from[0])) break;",
    ),
    bug(
        "two-shot: the owner adds its pack of another row",
        TWO_SHOT,
        "const Pack own = norm.load_x(row_at(i), j);",
        "const Pack own = norm.load_x(row_at(0), j);",
    ),
    bug(
        "two-shot: the pack of the row before is pushed",
        TWO_SHOT,
        "load_next(i + 1);",
        "load_next(i);",
    ),
    # ---- two-shot: the pipeline ----
    Bug(
        "two-shot: a row is added before it is pushed",
        (
            Edit(TWO_SHOT, "if (step != 0 && row_at(step) < rows.rows) push_row(step);", ""),
            Edit(
                TWO_SHOT,
                "add_row(step - lead, kept);",
                "{ add_row(step - lead, kept); if (step != lead) push_row(step - lead); }",
            ),
        ),
    ),
    bug(
        "two-shot: the last rows are left out",
        TWO_SHOT,
        "row_at(step) < rows.rows + 2 * lead * team.row_step()",
        "row_at(step) < rows.rows + lead * team.row_step()",
    ),
    # ---- two-shot: the call number, programmatic dependent launch, GAN_STRICT_ORDER ----
    Bug(
        "two-shot: call number read before the PDL wait",
        (Edit(TWO_SHOT, BEGIN, ""), Edit(TWO_SHOT, WAIT, BEGIN + WAIT)),
    ),
    bug("two-shot: idle copies are not advanced", TWO_SHOT, ADVANCE_IDLE, "", "explore"),
    bug("two-shot: the own copy is not advanced", TWO_SHOT, ADVANCE_OWN, ""),
    bug(
        "two-shot: the own copy is advanced before all have read it",
        TWO_SHOT,
        ADVANCE_IDLE,
        ADVANCE_IDLE + ADVANCE_OWN,
        "weak",
    ),
    bug("two-shot: no PDL wait", TWO_SHOT, WAIT, "if (rows.rows == 0)\n" + WAIT, "weak"),
    bug(
        "two-shot: no fence before the pushes",
        TWO_SHOT,
        FENCE + "      const Place",
        "      const Place",
        "strict",
    ),
    bug(
        "two-shot: no fence before the sums",
        TWO_SHOT,
        "      if (call.broken) continue;\n" + FENCE,
        "      if (call.broken) continue;\n",
        "strict",
    ),
    bug("two-shot: no fence after the polls", TWO_SHOT, SECOND_FENCE, "", "strict"),
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
            Edit(
                ROW_NORM,
                "sum_of_segments<kByThread>(sums_.sum[buffer],",
                "sum_of_segments<kByThread>(sums_.sum[0],",
            ),
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
        "few segments added in another order",
        ROW_NORM,
        "add_rn(value[i], value[i + kCount / 2])",
        "add_rn(value[2 * i], value[2 * i + 1])",
        dtype="fp32",
    ),
    bug(
        "few segments, and what lies behind them",
        ROW_NORM,
        "s = team_.segments(); s < kFewSegments; ++s)",
        "s = team_.segments(); s < 0; ++s)",
    ),
    bug(
        "packs beyond the row",
        ROW_NORM,
        "return team_.pack(j) < params_.row_packs; }",
        "return team_.pack(j) <= params_.row_packs; }",
    ),
    bug(
        "what is beyond the row is no zero",
        ROW_NORM,
        "return in_row(j) ? nan_pack() : zero_pack(); }",
        "return nan_pack(); }",
    ),
    bug(
        "the local kernel: a pack beyond the row has what the one before had",
        "local_norm.cuh",
        "    if (!kOnePack) sum = zero_pack();\n",
        "",
    ),
    bug(
        "the residual of another pack is added beyond the row",
        ROW_NORM,
        "if ((kOnePack || in_row(j)) && !GAN_UNLIKELY(!has_residual()))",
        "if (!GAN_UNLIKELY(!has_residual()))",
    ),
    bug(
        "the residual beyond the row is no zero",
        ROW_NORM,
        "Pack residual_ = zero_pack();",
        "Pack residual_ = nan_pack();",
    ),
    bug(
        "norm_out is written beyond the row",
        ROW_NORM,
        "if (in_row(j)) store(norm_out, out);",
        "store(norm_out, out);",
    ),
    bug(
        "norm_out is written a row further on",
        ROW_NORM,
        "Pack* norm_out = pack_address(params_.norm_out, row, 0);",
        "Pack* norm_out = pack_address(params_.norm_out, row + 1, 0);",
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
        "if (static_cast<int32_t>(now - deadline_ - awaited.grace_ticks) < 0) return false;",
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
    bug(
        "two-shot: peers' sums are waited for no longer than their owners wait",
        TWO_SHOT,
        "{offset, area, 1, exchange.owner_grace_ticks}",
        "{offset, area, 1, 0}",
        "faults",
    ),
    Bug(
        "two-shot: the report names another than the owner",
        (
            Edit(
                TWO_SHOT,
                "{offset, area, 1, exchange.owner_grace_ticks}",
                "{offset, 0, kRanks - 1, exchange.owner_grace_ticks}",
            ),
        ),
        ("faults",),
        base=600,
    ),
    bug(
        "two-shot: who gives up pushes a sum all the same",
        TWO_SHOT,
        "      if (call.broken) continue;\n",
        "",
        "faults",
    ),
    bug(
        "two-shot: pushes go on after a failure",
        TWO_SHOT,
        "if (!norm.in_row(j) || call.broken) continue;",
        "if (!norm.in_row(j)) continue;",
        "faults",
    ),
    bug(
        "two-shot: clears go on after a failure",
        TWO_SHOT,
        CLEAR_SUM,
        CLEAR_SUM.replace(" && !call.broken", ""),
        "faults",
    ),
    bug("two-shot: rows half done are left so", TWO_SHOT, "      norm.spoil(row);\n", "", "faults"),
    bug(
        "two-shot: a row is taken for whole by those who have their packs",
        TWO_SHOT,
        "if (GAN_UNLIKELY(has_nan) && has_failed(exchange)) {",
        "if (call.broken) {",
        "faults",
    ),
    Bug(
        "two-shot: a failed flag is seen without the claim",
        (Edit(TWO_SHOT, "  if (call.broken) join_failure();\n", ""),),
        ("faults",),
        base=3000,
        times=4,
    ),
    # ---- debug mode ----
    bug(
        "debug mode: one place for the words of all turns",
        DEBUG_MODE,
        "place = turn % kStages;",
        "place = 0 * turn;",
        "debug",
    ),
    bug(
        "debug mode: a word of an earlier turn counts",
        DEBUG_MODE,
        "return static_cast<uint32_t>(word >> 32) == turn;",
        "return (word >> 32) != 0 * turn;",
        "debug",
    ),
    bug(
        "debug mode: no difference is seen",
        DEBUG_MODE,
        "is_of_turn(theirs, turn) && theirs != mine;",
        "false;",
        "debug",
    ),
    bug(
        "debug mode: calls that overlap are made",
        DEBUG_MODE,
        "      if (claim_once(&own->failure_claim)) break_later_calls(own);\n",
        "",
        "debug",
    ),
    bug(
        "debug mode: calls are never over",
        DEBUG_MODE,
        "in_use, 0u - 1); }",
        "in_use, 0u); }",
        "debug",
    ),
    bug(
        "debug mode: calls that differ are made",
        DEBUG_MODE,
        "  break_later_calls(own);\n}",
        "}",
        "debug",
    ),
    bug(
        "debug mode: the report of one who does not come names who waits",
        DEBUG_MODE,
        "FailureRecord{rank, 0,",
        "FailureRecord{exchange.rank, 0,",
        "debug",
    ),
)

# What each of these stages must pass: the kernels as they are, built in the same way. Not explore,
# which would take as long as all others; test_stage asks it of the whole build.
CONTROL = Bug(
    "no bug", (), ("fuzz", "weak", "strict", "faults", "debug", "mixed", "tsan", "asan", "full")
)
