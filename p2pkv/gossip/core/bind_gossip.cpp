// Python's view of the protocol core. Types and meaning are documented in p2pkv/gossip/_gossip.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <memory>

#include "bindings.hpp"
#include "gossip.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace p2pkv;
using gossip::Gossip;
using gossip::Life;
using gossip::Payload;

namespace {

Payload payload_of(const nb::bytes& bytes) { return std::make_shared<const std::string>(bytes.c_str(), bytes.size()); }
nb::bytes bytes_of(const Payload& payload) { return nb::bytes(payload->data(), payload->size()); }

index::Entries& entries_of(const nb::capsule& capsule) {
  void* found = PyCapsule_GetPointer(capsule.ptr(), index::kEntriesCapsule);
  if (found == nullptr) throw nb::python_error();
  return *static_cast<index::Entries*>(found);
}

/// The core with what must live as long as it does.
struct Bound {
  nb::object entries, own;
  std::unique_ptr<Gossip> core;
  // The addresses of the last broadcast: the same ones, most of the time.
  std::shared_ptr<const std::vector<gossip::ContactId>> targets;
  nb::object addresses;
};

nb::tuple member_tuple(const Gossip& core, std::uint32_t slot) {
  const gossip::Member& member = *core.member_at(slot);
  return nb::make_tuple(member.life.node, member.life.epoch, member.life.instance, slot,
                        static_cast<int>(member.state), member.since, member.last_heard,
                        core.address_of(member.contact), member.has_card ? nb::bytes(member.card.data(), member.card.size()) : nb::bytes(),
                        member.replica.seq(), member.proven_at, member.knows_us, member.protocol, member.card_number,
                        member.has_rtt ? member.rtt_s : -1.0);
}

gossip::Settings settings_of(const nb::dict& given) {
  gossip::Settings settings;
  for (auto [key, value] : given) {
    const auto name = nb::cast<std::string>(key);
    if (name == "flush_s") settings.flush_s = nb::cast<double>(value);
    else if (name == "heartbeat_s") settings.heartbeat_s = nb::cast<double>(value);
    else if (name == "frames_per_s") settings.frames_per_s = nb::cast<double>(value);
    else if (name == "silence_s") settings.silence_s = nb::cast<double>(value);
    else if (name == "purge_s") settings.purge_s = nb::cast<double>(value);
    else if (name == "digest_s") settings.digest_s = nb::cast<double>(value);
    else if (name == "forget_s") settings.forget_s = nb::cast<double>(value);
    else if (name == "members_max") settings.members_max = nb::cast<std::uint32_t>(value);
    else if (name == "entries_per_owner_max") settings.entries_per_owner_max = nb::cast<std::size_t>(value);
    else if (name == "protocol_max") settings.protocol_max = nb::cast<std::uint8_t>(value);
    else throw nb::value_error(("no such setting: " + name).c_str());
  }
  return settings;
}

}  // namespace

gossip::Settings gossip_settings(const nb::dict& given) { return settings_of(given); }

nb::dict gossip_counts(const gossip::Counts& counts) {
  nb::dict out;
#define X(name) out[#name] = counts.name;
  P2PKV_GOSSIP_COUNTS(X)
#undef X
  return out;
}

NB_MODULE(_gossip, m) {
  nb::set_leak_warnings(false);
  m.attr("PROTOCOL_MIN") = gossip::kProtocolMin;
  m.attr("PROTOCOL_MAX") = gossip::kProtocolMax;
  m.attr("KEYS_PER_DELTA") = gossip::kKeysPerDelta;
  m.attr("FRAME_BYTES_MAX") = gossip::kFrameBytesMax;

  nb::class_<gossip::ReplayWindow>(m, "ReplayWindow")
      .def(nb::init<>())
      .def("fresh", &gossip::ReplayWindow::fresh, "counter"_a)
      .def("use", &gossip::ReplayWindow::use, "counter"_a)
      .def_ro_static("FRAMES", &gossip::ReplayWindow::kFrames);
  nb::class_<gossip::FrameCounter>(m, "FrameCounter")
      .def(nb::init<std::uint64_t>(), "first"_a = 0)
      .def("take", &gossip::FrameCounter::take)
      .def_prop_ro("taken", &gossip::FrameCounter::taken);

  nb::class_<Bound>(m, "Gossip")
      .def("__init__",
           [](Bound* self, const nb::dict& settings, std::uint64_t node, std::uint32_t epoch, std::uint64_t instance,
              std::string address, nb::capsule entries, nb::capsule own, std::uint64_t seed, double now) {
             auto& others = entries_of(entries);
             auto& mine = entries_of(own);
             auto core = std::make_unique<Gossip>(settings_of(settings), Life{node, epoch, instance}, std::move(address),
                                                  others, mine, seed, now);
             new (self) Bound{entries, own, std::move(core), nullptr, nb::none()};
           },
           "settings"_a, "node"_a, "epoch"_a, "instance"_a, "address"_a, "entries"_a, "own"_a, "seed"_a, "now"_a)
      .def("set_card", [](Bound& self, double now, std::uint32_t number, const nb::bytes& card) {
             self.core->set_card(now, number, std::string(card.c_str(), card.size()));
           }, "now"_a, "number"_a, "card"_a)
      .def("set_load", [](Bound& self, std::uint64_t mib) { self.core->set_load(mib); }, "mib"_a)
      .def("load_of", [](const Bound& self, std::uint64_t node, double now) { return self.core->load_of(node, now); },
           "node"_a, "now"_a)
      .def("on_seeds", [](Bound& self, double now, std::uint32_t source, const std::vector<std::string>& addresses) {
             self.core->on_seeds(now, source, addresses);
           }, "now"_a, "source"_a, "addresses"_a)
      .def("on_frame", [](Bound& self, double now, std::uint64_t node, std::uint32_t epoch, std::uint64_t instance,
                          std::string_view source, const nb::bytes& payload) {
             self.core->on_frame(now, Life{node, epoch, instance}, source, payload_of(payload));
           }, "now"_a, "node"_a, "epoch"_a, "instance"_a, "source"_a, "payload"_a)
      .def("on_letter", [](Bound& self, double now, std::uint64_t node, std::uint32_t epoch, std::uint64_t instance,
                           const nb::bytes& payload) {
             self.core->on_letter(now, Life{node, epoch, instance}, payload_of(payload));
           }, "now"_a, "node"_a, "epoch"_a, "instance"_a, "payload"_a)
      .def("on_lost", [](Bound& self, double now, std::uint64_t node) { self.core->on_lost(now, node); }, "now"_a, "node"_a)
      .def("publish", [](Bound& self, std::uint64_t seq, std::uint64_t checksum, const std::vector<nb::bytes>& by_tier) {
             std::array<std::vector<std::uint64_t>, gossip::kTiers> keys;
             std::size_t all = 0;
             if (by_tier.size() > gossip::kTiers) throw nb::value_error("too many tiers");
             for (std::size_t t = 0; t < by_tier.size(); ++t) {
               if (by_tier[t].size() % 8 != 0) throw nb::value_error("keys must be a multiple of 8 bytes long");
               keys[t].resize(by_tier[t].size() / 8);
               std::memcpy(keys[t].data(), by_tier[t].c_str(), by_tier[t].size());
               all += keys[t].size();
             }
             if (all > gossip::kKeysPerDelta) throw nb::value_error("too many keys for a delta");
             self.core->publish(seq, checksum, keys);
           }, "seq"_a, "checksum"_a, "keys_by_tier"_a)
      .def("on_timer", [](Bound& self, double now) { self.core->on_timer(now); }, "now"_a)
      .def("leave", [](Bound& self, double now) { self.core->leave(now); }, "now"_a)
      .def("restart", [](Bound& self, double now, std::uint32_t epoch, std::uint64_t instance) {
             self.core->restart(now, Life{self.core->life().node, epoch, instance});
           }, "now"_a, "epoch"_a, "instance"_a)
      .def_prop_ro("next_timer", [](const Bound& self) { return self.core->next_timer(); })
      .def("flush_due", [](const Bound& self, double now) { return self.core->flush_due(now); }, "now"_a)
      .def("take", [](Bound& self) {
             Gossip& core = *self.core;
             nb::list frames, letters, events;
             for (const auto& frame : core.frames) {
               if (self.targets != frame.to) {
                 nb::list addresses;
                 for (const gossip::ContactId id : *frame.to) addresses.append(core.address_of(id));
                 self.targets = frame.to;
                 self.addresses = addresses;
               }
               frames.append(nb::make_tuple(bytes_of(frame.payload), self.addresses));
             }
             for (const auto& letter : core.letters)
               letters.append(nb::make_tuple(bytes_of(letter.payload), core.address_of(letter.to)));
             for (const auto& event : core.events)
               events.append(nb::make_tuple(static_cast<int>(event.kind), event.node, event.slot, event.number, event.text));
             core.frames.clear();
             core.letters.clear();
             core.events.clear();
             return nb::make_tuple(frames, letters, events);
           })
      .def_prop_ro("pending", [](const Bound& self) {
             return !self.core->frames.empty() || !self.core->letters.empty() || !self.core->events.empty();
           })
      .def("member", [](const Bound& self, std::uint64_t node) -> nb::object {
             const std::uint32_t slot = self.core->slot_of(node);
             return slot == 0 ? nb::object(nb::none()) : nb::object(member_tuple(*self.core, slot));
           }, "node"_a)
      .def("members", [](const Bound& self) {
             nb::list out;
             for (const std::uint32_t slot : self.core->slots()) out.append(member_tuple(*self.core, slot));
             return out;
           })
      .def("slot_of", [](const Bound& self, std::uint64_t node) { return self.core->slot_of(node); }, "node"_a)
      .def("node_at", [](const Bound& self, std::uint32_t slot) {
             const gossip::Member* member = self.core->member_at(slot);
             return member == nullptr ? std::uint64_t{0} : member->life.node;
           }, "slot"_a)
      .def_prop_ro("alive", [](const Bound& self) { return self.core->alive(); })
      .def_prop_ro("contacts", [](const Bound& self) { return self.core->contacts(); })
      .def_prop_ro("silence_s", [](const Bound& self) { return self.core->silence_s(); })
      .def_prop_ro("flush_s", [](const Bound& self) { return self.core->flush_s(); })
      .def_prop_ro("counts", [](const Bound& self) { return gossip_counts(self.core->counts); });

  bind_simulation(m);
}
