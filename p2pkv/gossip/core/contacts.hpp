// Addresses at which somebody may be: seeds from discovery, what members say of each other, and where members were.
// Reasons to say HELLO, never to think anybody alive or dead. Bounded. Pure.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace p2pkv::gossip {

using ContactId = std::uint32_t;
inline constexpr ContactId kNoContact = ~ContactId{0};

struct Contact {
  std::string address;      // empty: free
  double added = 0;         // or last answered
  double next_at = 0;       // when HELLO is due, while nobody there is known
  double sent_at = -1e9;    // the last one
  double own_until = 0;     // it turned out to be this node's own
  std::uint32_t slot = 0;   // of the member there; 0: none is known
  std::uint32_t sources = 0;  // bits of the discovery sources that name it; 0: hearsay
  std::uint32_t failures = 0;
  bool answered = false;    // somebody was there once
};

class Contacts {
 public:
  explicit Contacts(std::size_t most) : most_(most) {}

  /// The contact of an address; made where there is room. kNoContact otherwise, and for what is no address.
  ContactId learn(double now, std::string_view address);
  ContactId find(std::string_view address) const;
  void forget(ContactId id);
  Contact& operator[](ContactId id) { return all_[id]; }
  const Contact& operator[](ContactId id) const { return all_[id]; }
  std::size_t size() const { return by_address_.size(); }
  std::size_t end() const { return all_.size(); }

 private:
  std::size_t most_;
  std::vector<Contact> all_;
  std::vector<ContactId> free_;
  std::unordered_map<std::string, ContactId> by_address_;
};

}  // namespace p2pkv::gossip
