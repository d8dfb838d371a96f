#include "contacts.hpp"

#include "messages.hpp"

namespace p2pkv::gossip {

ContactId Contacts::find(std::string_view address) const {
  const auto found = by_address_.find(std::string(address));
  return found == by_address_.end() ? kNoContact : found->second;
}

ContactId Contacts::learn(double now, std::string_view address) {
  if (const ContactId known = find(address); known != kNoContact) return known;
  if (address.empty() || address.size() > kAddressBytesMax || by_address_.size() >= most_) return kNoContact;
  ContactId id = static_cast<ContactId>(all_.size());
  if (free_.empty()) {
    all_.emplace_back();
  } else {
    id = free_.back();
    free_.pop_back();
  }
  all_[id] = Contact{};
  all_[id].address = address;
  all_[id].added = all_[id].next_at = now;
  by_address_.emplace(address, id);
  return id;
}

void Contacts::forget(ContactId id) {
  by_address_.erase(all_[id].address);
  all_[id] = Contact{};
  free_.push_back(id);
}

}  // namespace p2pkv::gossip
