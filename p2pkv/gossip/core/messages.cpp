#include "messages.hpp"

namespace p2pkv::gossip {

namespace {

Writer begin(Type type, std::size_t expected) {
  Writer out(expected + 1);
  out.put(static_cast<std::uint8_t>(type));
  return out;
}

Reader open(std::string_view bytes, Type type, bool& good) {
  good = type_of(bytes) == static_cast<std::uint8_t>(type);
  return good ? Reader(bytes.data() + 1, bytes.size() - 1) : Reader(bytes.data(), 0);
}

void put(Writer& out, const Life& life) { out.put(life.node).put(life.epoch).put(life.instance); }

Life get_life(Reader& in) {
  Life life;
  life.node = in.get<std::uint64_t>();
  life.epoch = in.get<std::uint32_t>();
  life.instance = in.get<std::uint64_t>();
  return life;
}

template <typename Count>
bool get_keys(Reader& in, KeysByTier& keys, std::size_t most) {
  std::array<std::size_t, kTiers> counts{};
  std::size_t all = 0;
  for (auto& count : counts) all += count = in.get<Count>();
  if (in.failed() || all > most) return false;
  for (std::size_t t = 0; t < kTiers; ++t) {
    keys[t].count = counts[t];
    keys[t].data = in.raw(counts[t] * sizeof(std::uint64_t));
  }
  return !in.failed();
}

void get_delta(Reader& in, Delta& out) {
  out.seq = in.get<std::uint64_t>();
  out.checksum = in.get<std::uint64_t>();
  out.card = in.get<std::uint32_t>();
}

}  // namespace

Payload encode_delta(std::uint64_t seq, std::uint64_t checksum, std::uint32_t card,
                     const std::array<std::vector<std::uint64_t>, kTiers>& keys) {
  Writer out = begin(Type::kDelta, kFrameBytesMax);
  out.put(seq).put(checksum).put(card);
  for (const auto& group : keys) out.put(static_cast<std::uint16_t>(group.size()));
  for (const auto& group : keys) out.raw(group.data(), group.size() * sizeof(std::uint64_t));
  return out.done();
}

Payload with_tips(const Payload& delta, const Tip* tips, std::size_t count, std::optional<std::uint16_t> load) {
  Writer out(delta->size() + 1 + count * 8 + sizeof(std::uint16_t));
  out.raw(delta->data(), delta->size()).put(static_cast<std::uint8_t>(count));
  for (std::size_t i = 0; i < count; ++i) out.put(tips[i].owner).put(tips[i].seq);
  if (load) out.put(*load);
  return out.done();
}

bool decode_body(std::string_view body, Delta& out) {
  Reader in(body.data(), body.size());
  get_delta(in, out);
  out.body = body;
  out.tip_count = 0;
  out.load.reset();
  return get_keys<std::uint16_t>(in, out.keys, kKeysPerDelta) && in.ended();
}

bool decode(std::string_view bytes, Delta& out) {
  bool good;
  Reader in = open(bytes, Type::kDelta, good);
  get_delta(in, out);
  if (!good || !get_keys<std::uint16_t>(in, out.keys, kKeysPerDelta)) return false;
  out.body = bytes.substr(1, bytes.size() - 1 - in.left());
  out.tip_count = 0;
  out.load.reset();
  if (in.left() == 0) return true;  // protocol 2
  out.tip_count = in.get<std::uint8_t>();
  if (out.tip_count > kTipsPerDelta) return false;
  for (std::size_t i = 0; i < out.tip_count; ++i) {
    out.tips[i].owner = in.get<std::uint32_t>();
    out.tips[i].seq = in.get<std::uint32_t>();
  }
  if (in.left() != 0) out.load = in.get<std::uint16_t>();  // from protocol 4
  return in.ended();
}

Payload encode(const Hello& hello) {
  Writer out = begin(Type::kHello, 32 + hello.address.size() + hello.card.size());
  out.put(hello.protocol_min).put(hello.protocol_max).put(static_cast<std::uint8_t>(hello.ask | hello.known << 1)).put(hello.echo);
  out.put(hello.card_number).text<std::uint8_t>(hello.address).text<std::uint16_t>(hello.card);
  return out.done();
}

bool decode(std::string_view bytes, Hello& out) {
  bool good;
  Reader in = open(bytes, Type::kHello, good);
  out.protocol_min = in.get<std::uint8_t>();
  out.protocol_max = in.get<std::uint8_t>();
  const auto flags = in.get<std::uint8_t>();
  out.ask = (flags & 1U) != 0;
  out.known = (flags & 2U) != 0;
  out.echo = in.get<std::uint64_t>();
  out.card_number = in.get<std::uint32_t>();
  out.address = in.text<std::uint8_t>();
  out.card = in.text<std::uint16_t>();
  return good && !in.failed();  // later versions may add to it
}

Payload encode(const Nack& nack) {
  Writer out = begin(Type::kNack, 36);
  put(out, nack.owner);
  return out.put(nack.from).put(nack.to).done();
}

bool decode(std::string_view bytes, Nack& out) {
  bool good;
  Reader in = open(bytes, Type::kNack, good);
  out.owner = get_life(in);
  out.from = in.get<std::uint64_t>();
  out.to = in.get<std::uint64_t>();
  return good && in.ended() && out.from <= out.to;
}

Payload encode_relay(const Life& owner, std::string_view body) {
  Writer out = begin(Type::kRelay, 20 + body.size());
  put(out, owner);
  return out.raw(body.data(), body.size()).done();
}

bool decode(std::string_view bytes, Relay& out) {
  bool good;
  Reader in = open(bytes, Type::kRelay, good);
  out.owner = get_life(in);
  return good && !in.failed() && decode_body(bytes.substr(bytes.size() - in.left()), out.delta) &&
         out.delta.key_count() > 0;
}

Payload encode_leave() { return begin(Type::kLeave, 0).done(); }

Payload encode(const Stale& stale) {
  return begin(Type::kStale, 24).put(stale.to).put(stale.epoch).put(stale.instance).put(stale.age_ms).done();
}

bool decode(std::string_view bytes, Stale& out) {
  bool good;
  Reader in = open(bytes, Type::kStale, good);
  out.to = in.get<std::uint64_t>();
  out.epoch = in.get<std::uint32_t>();
  out.instance = in.get<std::uint64_t>();
  out.age_ms = in.get<std::uint32_t>();
  return good && in.ended();
}

Payload encode(const Digest& digest) {
  Writer out = begin(Type::kDigest, 8 + digest.entries.size() * 56);
  out.put(static_cast<std::uint8_t>(digest.ask)).put(static_cast<std::uint32_t>(digest.entries.size()));
  for (const auto& entry : digest.entries) {
    put(out, entry.life);
    out.put(entry.seq).put(entry.age_ms).text<std::uint8_t>(entry.address);
  }
  return out.done();
}

bool decode(std::string_view bytes, Digest& out) {
  bool good;
  Reader in = open(bytes, Type::kDigest, good);
  out.ask = in.get<std::uint8_t>() != 0;
  const auto count = in.get<std::uint32_t>();
  out.entries.clear();
  if (!good || in.failed() || count > kMembersMax || count * 33ULL > in.left()) return false;
  out.entries.resize(count);
  for (auto& entry : out.entries) {
    entry.life = get_life(in);
    entry.seq = in.get<std::uint64_t>();
    entry.age_ms = in.get<std::uint32_t>();
    entry.address = in.text<std::uint8_t>();
  }
  return in.ended();
}

Payload encode(const Want& want) {
  Writer out = begin(Type::kWant, 8 + want.owners.size() * 28);
  out.put(want.id).put(static_cast<std::uint32_t>(want.owners.size()));
  for (const auto& wanted : want.owners) {
    put(out, wanted.owner);
    out.put(wanted.have);
  }
  return out.done();
}

bool decode(std::string_view bytes, Want& out) {
  bool good;
  Reader in = open(bytes, Type::kWant, good);
  out.id = in.get<std::uint32_t>();
  const auto count = in.get<std::uint32_t>();
  out.owners.clear();
  if (!good || in.failed() || count > kMembersMax || count * 28ULL != in.left()) return false;
  out.owners.resize(count);
  for (auto& wanted : out.owners) {
    wanted.owner = get_life(in);
    wanted.have = in.get<std::uint64_t>();
  }
  return in.ended();
}

Payload encode(const Snapshot& snapshot) {
  std::size_t bytes = 64;
  for (const auto& group : snapshot.keys) bytes += group.count * sizeof(std::uint64_t);
  Writer out = begin(Type::kSnapshot, bytes);
  put(out, snapshot.owner);
  out.put(snapshot.seq).put(snapshot.checksum).put(snapshot.part).put(snapshot.parts);
  for (const auto& group : snapshot.keys) out.put(static_cast<std::uint32_t>(group.count));
  for (const auto& group : snapshot.keys) out.raw(group.data, group.count * sizeof(std::uint64_t));
  return out.done();
}

bool decode(std::string_view bytes, Snapshot& out) {
  bool good;
  Reader in = open(bytes, Type::kSnapshot, good);
  out.owner = get_life(in);
  out.seq = in.get<std::uint64_t>();
  out.checksum = in.get<std::uint64_t>();
  out.part = in.get<std::uint32_t>();
  out.parts = in.get<std::uint32_t>();
  return good && get_keys<std::uint32_t>(in, out.keys, kPartKeys) && in.ended() && out.keys[0].count == 0 &&
         out.part < out.parts && out.parts <= kPartsMax;
}

Payload encode_wanted(std::uint32_t id) { return begin(Type::kWanted, 4).put(id).done(); }

bool decode(std::string_view bytes, std::uint32_t& wanted_id) {
  bool good;
  Reader in = open(bytes, Type::kWanted, good);
  wanted_id = in.get<std::uint32_t>();
  return good && in.ended();
}

Payload encode_card_want() { return begin(Type::kCardWant, 0).done(); }

Payload encode(const CardLetter& card) {
  return begin(Type::kCard, 8 + card.card.size()).put(card.number).text<std::uint32_t>(card.card).done();
}

bool decode(std::string_view bytes, CardLetter& out) {
  bool good;
  Reader in = open(bytes, Type::kCard, good);
  out.number = in.get<std::uint32_t>();
  out.card = in.text<std::uint32_t>();
  return good && in.ended() && out.card.size() <= kCardBytesMax;
}

}  // namespace p2pkv::gossip
