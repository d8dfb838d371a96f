// What members say to each other about who is there and who holds what. docs/protocol.md has every byte.
//
// Frames travel in sealed datagrams, one message each; they may be lost, repeated and overtaken. Letters travel over TCP
// and may be lost with their connection. Both begin with a byte that says what they are. Decoding is strict: what is not
// exactly a message is none. Views in decoded messages point into the bytes that were decoded.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "bytes.hpp"
#include "life.hpp"

namespace p2pkv::gossip {

inline constexpr std::uint8_t kProtocolMin = 2;
inline constexpr std::uint8_t kProtocolMax = 4;  // 3: deltas carry tips; 4: and what the sender is busy with

/// Sealed, a frame of this fits the MTU of any network that a cell is built on (1,400 bytes), tunnels included.
inline constexpr std::size_t kFrameBytesMax = 1'350;
/// Header and tag of a sealed frame: p2pkv/gossip/sealed.py.
inline constexpr std::size_t kSealBytes = 50;
inline constexpr std::size_t kKeysPerDelta = 156;
inline constexpr std::size_t kTipsPerDelta = 6;
inline constexpr std::size_t kTiers = 5;  // GONE, HBM, DRAM, SSD, SHARED
inline constexpr std::size_t kAddressBytesMax = 255;
inline constexpr std::size_t kCardBytesMax = 1U << 20U;
inline constexpr std::size_t kMembersMax = 4'096;
inline constexpr std::size_t kPartKeys = 16'384;
inline constexpr std::size_t kPartsMax = 1U << 16U;

enum class Type : std::uint8_t {
  kDelta = 1, kHello = 2, kNack = 3, kRelay = 4, kLeave = 5, kStale = 6,          // frames
  kDigest = 16, kWant = 17, kSnapshot = 18, kWanted = 19, kCardWant = 20, kCard = 21,  // letters
};

/// What a message is, by its first byte.
inline std::uint8_t type_of(std::string_view bytes) { return bytes.empty() ? 0 : static_cast<std::uint8_t>(bytes[0]); }

struct KeyView {
  const char* data = nullptr;  // packed u64
  std::size_t count = 0;
};
using KeysByTier = std::array<KeyView, kTiers>;

/// "That owner's log has come so far", by hearsay: a reason to ask the owner, never to believe anything.
struct Tip {
  std::uint32_t owner;  // tip_tag() of its node id
  std::uint32_t seq;    // the low half
};

/// The next batch of the sender's own log; without keys: where the log stands (the heartbeat).
struct Delta {
  std::uint64_t seq = 0;
  std::uint64_t checksum = 0;   // of the owner's set after this batch
  std::uint32_t card = 0;       // number of the sender's card
  KeysByTier keys{};
  std::array<Tip, kTipsPerDelta> tips{};
  std::size_t tip_count = 0;
  std::optional<std::uint16_t> load;  // MiB that the sender is giving to others now; 65535: or more
  std::string_view body;        // all but type, tips and load: what a RELAY repeats

  std::size_t key_count() const {
    std::size_t n = 0;
    for (const auto& group : keys) n += group.count;
    return n;
  }
};

/// The sender introduces itself. `echo`: the instance of whom it answers, which proves that this is no recording.
struct Hello {
  std::uint8_t protocol_min = kProtocolMin;
  std::uint8_t protocol_max = kProtocolMax;
  bool ask = false;    // please answer: the sender has not heard yet that you know it
  bool known = false;  // the sender knows the life that it answers
  std::uint64_t echo = 0;  // 0: answers nobody
  std::uint32_t card_number = 0;
  std::string_view address;  // host:port; the host may be a wildcard
  std::string_view card;     // opaque here; empty: it is too long for a frame, ask for it by CARD_WANT
};

/// "I miss deltas from..to of this owner's log": to the owner, or to anybody who may have them.
struct Nack {
  Life owner;
  std::uint64_t from = 0, to = 0;
};

/// A delta of somebody else's log, repeated.
struct Relay {
  Life owner;
  Delta delta;
};

struct Stale {
  std::uint64_t to = 0;  // instance of the life that is told
  std::uint32_t epoch = 0;
  std::uint64_t instance = 0;
  std::uint32_t age_ms = 0;  // since that later life was heard
};

struct DigestEntry {
  Life life;
  std::uint64_t seq = 0;
  std::uint32_t age_ms = 0;
  std::string_view address;
};

struct Digest {
  bool ask = false;  // please answer with yours
  std::vector<DigestEntry> entries;
};

struct Wanted {
  Life owner;
  std::uint64_t have = 0;  // sequence number; older snapshots are of no use
};

/// "Send me these owners' sets, as far as you have them"; answered by SNAPSHOTs, then WANTED with the same number.
struct Want {
  std::uint32_t id = 0;
  std::vector<Wanted> owners;
};

/// A part of an owner's set at (life, seq). `checksum` is the whole set's.
struct Snapshot {
  Life owner;
  std::uint64_t seq = 0, checksum = 0;
  std::uint32_t part = 0, parts = 1;
  KeysByTier keys{};  // none in tier 0
};

struct CardLetter {
  std::uint32_t number = 0;
  std::string_view card;
};

// A delta's frame without its tips and load, and with them: the first is kept for those who missed it.
Payload encode_delta(std::uint64_t seq, std::uint64_t checksum, std::uint32_t card,
                     const std::array<std::vector<std::uint64_t>, kTiers>& keys);
Payload with_tips(const Payload& delta, const Tip* tips, std::size_t count, std::optional<std::uint16_t> load);
Payload encode(const Hello& hello);
Payload encode(const Nack& nack);
Payload encode_relay(const Life& owner, std::string_view body);
Payload encode_leave();
Payload encode(const Stale& stale);
Payload encode(const Digest& digest);
Payload encode(const Want& want);
Payload encode(const Snapshot& snapshot);
Payload encode_wanted(std::uint32_t id);
Payload encode_card_want();
Payload encode(const CardLetter& card);

bool decode(std::string_view bytes, Delta& out);
bool decode(std::string_view bytes, Hello& out);
bool decode(std::string_view bytes, Nack& out);
bool decode(std::string_view bytes, Relay& out);
bool decode(std::string_view bytes, Stale& out);
bool decode(std::string_view bytes, Digest& out);
bool decode(std::string_view bytes, Want& out);
bool decode(std::string_view bytes, Snapshot& out);
bool decode(std::string_view bytes, std::uint32_t& wanted_id);
bool decode(std::string_view bytes, CardLetter& out);
/// A delta without its type byte and tips, as tails keep it and RELAY carries it.
bool decode_body(std::string_view body, Delta& out);

}  // namespace p2pkv::gossip
