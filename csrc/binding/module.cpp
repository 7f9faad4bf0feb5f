// The Python module _C: the host objects of the library. No torch.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding/slow_path.h"
#include "host/local_plan.h"
#include "host/workspace.h"

namespace py = pybind11;
using namespace gan;

namespace {

// plan.Rule's fields, in its order, without the last, which is for people.
using RuleTuple = std::tuple<uint32_t, uint32_t, uint64_t, uint32_t, uint32_t, uint32_t, uint32_t,
                             uint32_t, uint32_t, uint32_t>;

std::vector<PlanRule> rules_of(const std::vector<RuleTuple>& tuples) {
  std::vector<PlanRule> rules;
  for (const auto& [max_rows, max_row_packs, max_packs, algorithm, blocks_a_team, max_threads,
                    threads_a_multiprocessor, trigger, lead_rows, multiprocessors] : tuples) {
    const bool valid = algorithm < std::size(kAlgorithmNames) && blocks_a_team >= 1 &&
                       blocks_a_team <= 8 && max_threads >= 32 && max_threads <= 1024 &&
                       max_threads % 32 == 0 &&
                       threads_a_multiprocessor <= kMaxThreadsAMultiprocessor && trigger <= 2 &&
                       lead_rows >= 1 && multiprocessors >= 1;
    if (!valid)
      throw py::value_error("rules: what plan.make_rules() returns is required; got another tuple");
    rules.push_back({max_rows, max_row_packs, max_packs, Algorithm{algorithm}, blocks_a_team,
                     max_threads, threads_a_multiprocessor, Trigger{trigger}, lead_rows,
                     multiprocessors});
  }
  return rules;
}

py::dict describe(const DeviceInfo& info) {
  py::dict d;
  d["name"] = info.name;
  d["uuid"] = info.uuid;
  d["compute_capability"] = py::make_tuple(info.major, info.minor);
  d["multiprocessors"] = info.multiprocessors;
  d["max_cluster"] = info.max_cluster;
  d["total_bytes"] = info.total_bytes;
  return d;
}

py::dict describe(const LaunchShape& shape) {
  py::dict d;
  d["algorithm"] = static_cast<uint32_t>(shape.algorithm);
  d["teams"] = shape.teams;
  d["blocks_a_team"] = shape.blocks_a_team;
  d["threads"] = shape.threads;
  d["packs_a_thread"] = shape.packs_a_thread;
  d["trigger"] = static_cast<uint32_t>(shape.trigger);
  d["lead_rows"] = shape.lead_rows;
  return d;
}

// Bumped whenever two builds could not talk to each other: the layout of the inbox or the protocol.
constexpr int kProtocol = 4;

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host objects of gemma_ar_norm: workspaces, IPC handles, devices.";
  m.attr("MAX_RANKS") = kMaxRanks;
  m.attr("MIN_MULTIPROCESSORS_OF_CLUSTERS") = kMinMultiprocessorsOfClusters;
  m.attr("MAX_HIDDEN") = kMaxHidden;

  m.def("build_info", [] {
    py::dict d;
    d["version"] = GAN_VERSION;
    d["cuda_runtime"] =
        std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
    d["protocol"] = kProtocol;
    return d;
  });
  m.def("driver_status", &driver_status);
  m.def("device_info", [](int device) { return describe(device_info(device)); }, py::arg("device"));
  m.def("peer_access", &peer_access, py::arg("device"), py::arg("peer_uuid"));
  m.def(
      "inbox_bytes",
      [](uint32_t ranks, uint64_t one_shot_rows, uint64_t two_shot_rows, uint64_t row_bytes) {
        if (ranks < 2 || ranks > kMaxRanks)
          throw py::value_error("ranks: 2 to 8 are required; got " + std::to_string(ranks));
        return inbox_bytes(ranks, one_shot_rows, two_shot_rows, row_bytes);
      },
      py::arg("ranks"), py::arg("one_shot_rows"), py::arg("two_shot_rows"), py::arg("row_bytes"));
  m.def(
      "launches",
      [](const std::vector<RuleTuple>& rules, uint32_t ranks, uint64_t inbox_bytes, uint64_t rows,
         uint32_t row_packs, const std::string& algorithm, uint64_t limit) {
        if (ranks < 2 || ranks > kMaxRanks || inbox_bytes < kHeaderBytes || row_packs == 0 ||
            row_packs > kMaxRowPacks)
          throw py::value_error(
              "launches: 2 to 8 ranks, an inbox and a row are required; got ranks " +
              std::to_string(ranks) + ", inbox_bytes " + std::to_string(inbox_bytes) +
              ", row_packs " + std::to_string(row_packs) + "; pass those of a workspace");
        const std::vector<PlanRule> plan = rules_of(rules);
        const InboxLayout layout = InboxLayout::of(ranks, inbox_bytes);
        py::list launches;
        for (uint64_t left = rows; left > 0 && launches.size() < limit;) {
          const PlannedLaunch next =
              next_launch(plan, layout, left, row_packs, algorithm_named(algorithm));
          if (next.rows == 0) {
            throw py::value_error("inbox_bytes: room for a row is required; got " +
                                  std::to_string(inbox_bytes) + "; ask inbox_bytes()");
          }
          py::dict d = describe(next.shape(row_packs));
          d["rows"] = next.rows;
          d["rule"] = next.rule - plan.data();
          launches.append(d);
          left -= next.rows;
        }
        return launches;
      },
      py::arg("rules"), py::arg("ranks"), py::arg("inbox_bytes"), py::arg("rows"),
      py::arg("row_packs"), py::arg("algorithm") = "auto", py::arg("limit") = UINT64_MAX);
  m.def(
      "local_launch",
      [](uint64_t rows, uint32_t row_packs, uint32_t multiprocessors, uint32_t max_cluster,
         bool starts_early) {
        if (rows == 0 || row_packs == 0 || row_packs > kMaxRowPacks || multiprocessors == 0 ||
            max_cluster == 0)
          throw py::value_error("local_launch: a row of 1 to " + std::to_string(kMaxRowPacks) +
                                " packs, a multiprocessor and a block are required; got rows " +
                                std::to_string(rows) + ", row_packs " + std::to_string(row_packs) +
                                ", multiprocessors " + std::to_string(multiprocessors) +
                                ", max_cluster " + std::to_string(max_cluster) +
                                "; pass those of a call");
        const std::vector<PlanRule> rules = local_rules(multiprocessors, max_cluster, starts_early);
        return describe(shape_of(choose(rules, rows, row_packs), rows, row_packs));
      },
      py::arg("rows"), py::arg("row_packs"), py::arg("multiprocessors"), py::arg("max_cluster") = 8,
      py::arg("starts_early") = true);
  m.def("unregister", &unregister_workspace, py::arg("group_name"),
        py::call_guard<py::gil_scoped_release>());
  m.def("reclaim", &reclaim_inboxes, py::call_guard<py::gil_scoped_release>());
  m.def("set_slow_path_error", &set_slow_path_error, py::arg("text"));

  py::class_<Workspace, std::shared_ptr<Workspace>>(m, "Workspace")
      .def(py::init([](int device, uint32_t rank, uint32_t ranks, uint64_t bytes,
                       uint64_t timeout_ns, const std::vector<RuleTuple>& rules, bool debug) {
             std::vector<PlanRule> plan = rules_of(rules);
             py::gil_scoped_release release;
             return std::make_shared<Workspace>(device, rank, ranks, bytes, timeout_ns,
                                                std::move(plan), debug);
           }),
           py::arg("device"), py::arg("rank"), py::arg("ranks"), py::arg("inbox_bytes"),
           py::arg("timeout_ns"), py::arg("rules"), py::arg("debug") = false)
      .def("ipc_handle", [](const Workspace& w) { return py::bytes(w.ipc_handle()); })
      .def("open_peers",
           [](Workspace& w, const std::vector<py::bytes>& handles) {
             const std::vector<std::string> raw(handles.begin(), handles.end());
             py::gil_scoped_release release;
             w.open_peers(raw);
           })
      .def("connect_local", &Workspace::connect_local)
      .def("register",
           [](std::shared_ptr<Workspace> self, const std::string& group_name) {
             py::gil_scoped_release release;  // the workspace that is replaced may be closed
             register_workspace(group_name, std::move(self));
           })
      .def("disconnect", &Workspace::disconnect, py::call_guard<py::gil_scoped_release>())
      .def("failure",
           [](const Workspace& w) -> py::object {
             const auto record = w.failure();
             if (!record) return py::none();
             return py::make_tuple(record->peer, record->call, record->row);
           })
      .def("take_reports", &Workspace::take_reports, py::call_guard<py::gil_scoped_release>())
      .def("has_overlapped", &Workspace::has_overlapped)
      .def("disagreement", &Workspace::disagreement)
      .def("close", &Workspace::close, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("rank", &Workspace::rank)
      .def_property_readonly("ranks", &Workspace::ranks)
      .def_property_readonly("device", &Workspace::device)
      .def_property_readonly("inbox_bytes", &Workspace::inbox_bytes);
}
