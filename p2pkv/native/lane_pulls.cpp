#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "frame.hpp"
#include "lane_state.hpp"
#include "msgpack.hpp"
#include "requests.hpp"

namespace p2pkv {
namespace {

constexpr double kAboutAsQuick = 1.5;  // times what the quickest holder takes: among these we take turns
// A pull that takes this much longer than expected, where others have the blocks too, is handed over.
constexpr double kEnoughFactor = 4.0;
constexpr double kEnoughMinS = 0.1;
constexpr uint64_t kTellBytes = 1 << 20;  // of a neighbour's blocks: what comes next takes as long as copying this on
constexpr uint64_t kLookBytes = 8 << 20;  // the lane's thread receives so much itself, while nobody asks it for anything

unsigned char status_of(Code code) {
    switch (code) {
        case Code::ok: return kMiss;
        case Code::timeout:
        case Code::stalled: return kTimeout;
        case Code::closed:
        case Code::protocol: return kUnreachable;
        case Code::cancelled: return kLost;
        case Code::refused: return kBusy;
    }
    return kLost;
}

}  // namespace

// Of a GET: what is not here, and who has all of it.
struct Lane::Wanted {
    std::vector<uint32_t> missing;  // into the request's keys
    uint64_t block_bytes = 0;
    uint32_t holders[kHoldersMax];  // their slots in the index
    size_t holders_count = 0;
    uint64_t bytes() const { return missing.size() * block_bytes; }
};

// Whether what is missing is on its way. It is when one peer has all of it, enough connections to that peer are idle (one,
// where our NIXL process reads from the peer's; none, where we read its memory ourselves), and nobody else is writing any
// of it.
bool Lane::start_pull(const std::shared_ptr<Request>& request) {
    Wanted wanted;
    if (!look_up(*request, &wanted)) return false;
    if (read_neighbour(request, wanted)) return true;
    std::vector<std::shared_ptr<Pull>> pulls;
    const bool planned = plan(request, wanted, &pulls);
    if (!planned) {
        for (const auto& pull : pulls) {
            for (const store::BlockRef& block : pull->blocks) store_.abort(block);
            pool_.give(pull->node, pull->slot, pull->fd);
        }
        return false;
    }
    request->pulls = pulls.size();
    request->connection->in_flight += static_cast<uint32_t>(pulls.size());
    {
        std::lock_guard lock(mutex_);
        for (const auto& pull : pulls) {
            pull->job = next_job_++;
            pulls_.insert(pull->job);
        }
    }
    for (const auto& pull : pulls) submit(pull);
    return true;
}

bool Lane::look_up(const Request& request, Wanted* out) {
    std::vector<uint64_t> index_keys;
    std::unordered_set<std::string_view> twins;
    for (uint32_t i = 0; i < request.keys.size(); ++i) {
        if (request.settled[i]) continue;
        out->missing.push_back(i);
        index_keys.push_back(index_key(request.keys[i], request.salt));
        if (request.left > 1 && !twins.insert(request.keys[i]).second) return false;
    }
    out->block_bytes = store_.block_bytes(request.space);
    if (out->block_bytes == 0) return false;
    out->holders_count =
        lookup_.holders_of_all(lookup_.index, index_keys.data(), index_keys.size(), out->holders, kHoldersMax);
    return out->holders_count != 0;
}

// Whether a neighbour has what is missing, and it has been read out of its memory, here and now: it is not much. In a block
// that has gone meanwhile, or is not what it should be, this ends like any other pull.
bool Lane::read_neighbour(const std::shared_ptr<Request>& request, const Wanted& wanted) {
    if (nixl_ == nullptr || wanted.bytes() > options_.neighbour_max) return false;
    std::shared_ptr<const Neighbour> neighbour;
    auto pull = std::make_shared<Pull>();
    for (size_t h = 0; h < wanted.holders_count && neighbour == nullptr; ++h) {
        pull->node = pool_.node_of(wanted.holders[h]);
        if (nixl_->way_to(pull->node) == NixlReads::Way::one_sided) neighbour = neighbours.find(pull->node);
    }
    if (neighbour == nullptr) return false;
    for (const uint32_t i : wanted.missing)
        if (!neighbour->directory.has(request->space, request->keys[i], wanted.block_bytes)) return false;
    pull->request = request;
    pull->indices = wanted.missing;
    pull->asked_at = now_s();
    if (!take_off(*request, wanted.missing)) return false;
    for (const uint32_t i : wanted.missing) {
        store::BlockRef block;
        if (store_.reserve(request->space, request->keys[i], pull->asked_at, &block) != store::Reserved::ok) {
            for (const store::BlockRef& reserved : pull->blocks) store_.abort(reserved);
            call_off(*request, wanted.missing);
            return false;
        }
        pull->blocks.push_back(std::move(block));
    }
    request->pulls = 1;
    ++request->connection->in_flight;
    IoEvent event;
    uint64_t untold = 0;  // bytes of blocks that the engine could copy on already
    for (size_t n = 0; n < pull->blocks.size(); ++n) {
        if (untold >= kTellBytes) {
            IoEvent part = std::exchange(event, {});
            event.bytes = part.bytes;
            untold = 0;
            on_event(*pull, std::move(part));
        }
        auto* to = reinterpret_cast<unsigned char*>(options_.arena) + store::Store::offset_of(*pull->blocks[n]);
        const auto proof = neighbour->directory.copy_proven(request->space, request->keys[pull->indices[n]], to,
                                                            wanted.block_bytes, &event.digests.emplace_back());
        event.statuses.push_back(proof == DirectoryReader::Proof::good   ? kOk
                                 : proof == DirectoryReader::Proof::gone ? kMiss
                                                                         : kRejected);
        if (proof != DirectoryReader::Proof::gone) event.bytes += wanted.block_bytes;
        hits_neighbour += proof == DirectoryReader::Proof::good;
        untold += wanted.block_bytes;
    }
    event.final = true;
    on_event(*pull, std::move(event));
    return true;
}

// Connections taken and slots reserved; false: it cannot be done, and what is in `pulls` has to be given back.
bool Lane::plan(const std::shared_ptr<Request>& request, const Wanted& wanted, std::vector<std::shared_ptr<Pull>>* pulls) {
    const std::vector<uint32_t>& missing = wanted.missing;
    const uint32_t* slots = wanted.holders;
    const size_t holders = wanted.holders_count;
    const uint64_t bytes = wanted.bytes();
    if (holders > 1 && bytes >= options_.spread_bytes) return false;  // they are quicker together
    const size_t streams_over_tcp = std::clamp<size_t>((bytes + options_.stream_bytes - 1) / options_.stream_bytes, 1,
                                                       std::min<size_t>(options_.streams, missing.size()));
    size_t streams = 0;
    const size_t turn = next_job_ % holders;  // so that of equal holders none is asked most
    double costs[kHoldersMax], least = std::numeric_limits<double>::infinity();
    for (size_t h = 0; h < holders; ++h) least = std::min(least, costs[h] = pool_.cost(slots[h], bytes));
    for (size_t h = 0; h < holders && pulls->empty(); ++h) {
        const size_t which = (turn + h) % holders;
        if (costs[which] > least * kAboutAsQuick) continue;
        const uint32_t slot = slots[which];
        const NixlReads::Way way = nixl_ == nullptr ? NixlReads::Way::tcp : nixl_->way_to(pool_.node_of(slot));
        if (way == NixlReads::Way::not_now) continue;
        const bool one_sided = way == NixlReads::Way::one_sided && bytes >= options_.one_sided_min;
        streams = one_sided ? 1 : streams_over_tcp;
        do {
            const Pool::Taken taken = pool_.take_slot(slot);
            if (taken.fd < 0) break;
            auto pull = std::make_shared<Pull>();
            pull->request = request;
            pull->slot = slot;
            pull->node = taken.node;
            pull->fd = taken.fd;
            pull->first_byte_s = taken.first_byte_s;
            pull->one_sided = one_sided;
            pull->look = bytes <= kLookBytes && taken.near;
            if (holders > 1) pull->enough_s = std::max(kEnoughMinS, kEnoughFactor * costs[which]);
            pulls->push_back(std::move(pull));
        } while (pulls->size() < streams);
    }
    if (pulls->empty() || pulls->size() < streams) return false;  // Python dials; they are in the pool next time

    if (!take_off(*request, missing)) return false;
    const double now = now_s();
    for (size_t n = 0; n < missing.size(); ++n) {  // neighbours go together
        Pull& pull = *(*pulls)[n * streams / missing.size()];
        store::BlockRef block;
        const std::string_view key = request->keys[missing[n]];
        if (store_.reserve(request->space, key, now, &block) != store::Reserved::ok) {
            call_off(*request, missing);
            return false;
        }
        pull.indices.push_back(missing[n]);
        pull.blocks.push_back(std::move(block));
    }
    return true;
}

// Say that these blocks are being pulled, before their slots are reserved: whom the store tells that somebody writes a
// block can watch it, until that is over. False: one of them is being pulled already, or distrusted.
bool Lane::take_off(const Request& request, const std::vector<uint32_t>& indices) {
    std::lock_guard lock(mutex_);
    for (size_t n = 0; n < indices.size() && !distrusted_.empty(); ++n)
        if (distrusted_.contains(flight_of(request.space, request.keys[indices[n]]))) return false;
    for (size_t n = 0; n < indices.size(); ++n) {
        if (flights_.emplace(flight_of(request.space, request.keys[indices[n]]), false).second) continue;
        while (n-- > 0) flights_.erase(flight_of(request.space, request.keys[indices[n]]));
        return false;
    }
    return true;
}

void Lane::call_off(const Request& request, const std::vector<uint32_t>& indices) {
    LaneEvent landed;
    landed.kind = LaneEvent::Kind::landed;
    landed.space = request.space;
    {
        std::lock_guard lock(mutex_);
        for (const uint32_t i : indices) {
            const auto flight = flights_.find(flight_of(request.space, request.keys[i]));
            if (flight->second) {
                landed.keys.emplace_back(request.keys[i]);
                landed.statuses.push_back(kLost);
            }
            flights_.erase(flight);
        }
    }
    if (!landed.keys.empty()) events_.push(std::move(landed));
}

void Lane::submit(const std::shared_ptr<Pull>& pull) {
    const Request& request = *pull->request;
    pull->asked_at = now_s();
    std::string body;
    msgpack::Writer writer(&body);
    if (pull->look && !pull->one_sided) settle_down(*pull);
    writer.array(4);
    writer.uint(request.space);
    writer.array(static_cast<uint32_t>(pull->indices.size()));
    for (const uint32_t i : pull->indices) writer.bin(request.keys[i]);
    writer.uint(static_cast<uint64_t>(options_.lease_ttl_s * 1000));
    if (pull->one_sided) {
        writer.boolean(false);  // the owner's process need not take part
    } else {
        writer.uint(pull->look ? current_processor() : kNoProcessor);
    }
    const auto to_duration = [](double s) {
        return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(std::max(0.0, s)));
    };
    const Limits limits{Clock::now() + to_duration(std::min(request.deadline - now_s(), pull->enough_s)), to_duration(pull->first_byte_s),
                        to_duration(options_.stall_s)};
    std::unique_ptr<Transfer> transfer;
    if (pull->one_sided) {
        std::vector<uint32_t> lengths;
        for (const store::BlockRef& block : pull->blocks)
            lengths.push_back(static_cast<uint32_t>(store::Store::length_of(*block)));
        auto answer = std::make_shared<PinAnswer>();
        transfer = std::make_unique<Pin>(pull->job, pull->fd, limits, frame::make(kTypePin, 0, body), lengths, answer);
        transfer->on_event = [this, pull, answer, asked_at = now_s()](IoEvent event) {
            on_pinned(pull, std::move(*answer), asked_at, std::move(event));
        };
    } else {
        std::vector<Destination> destinations;
        for (const store::BlockRef& block : pull->blocks)
            destinations.push_back({reinterpret_cast<unsigned char*>(options_.arena) + store::Store::offset_of(*block),
                                    static_cast<uint32_t>(store::Store::length_of(*block))});
        auto receive = std::make_unique<Receive>(pull->job, pull->fd, limits, frame::make(kTypeGet, 0, body),
                                                 std::move(destinations), options_.partial_bytes, options_.ahead_bytes);
        if (pull->look) receive->look = [this] { return !has_events(); };
        transfer = std::move(receive);
        transfer->on_event = [this, pull](IoEvent event) { on_event(*pull, std::move(event)); };
    }
    if (receiver_.submit(std::move(transfer))) return;
    IoEvent refused;  // it is full; the request is handed over once all its pulls are over
    refused.final = true;
    refused.code = Code::cancelled;
    on_event(*pull, std::move(refused));
}

// The lane's thread is about to receive this itself: beside the engine, if that is worth it.
void Lane::settle_down(const Pull& pull) {
    uint64_t bytes = 0;
    for (const store::BlockRef& block : pull.blocks) bytes += store::Store::length_of(*block);
    if (bytes < kWorthArranging) return placement_.give_up();
    placement_.arrange(pull.request->processor, 0, gettid());
}

bool Lane::has_events() const {
    epoll_event event;
    return epoll_wait(epoll_, &event, 1, 0) != 0;
}

// The owner holds the blocks for us: have them read. Until the end of the lease at most, counted from before we asked.
void Lane::on_pinned(const std::shared_ptr<Pull>& pull, PinAnswer answer, double asked_at, IoEvent event) {
    // Why the owner refuses may be that its NIXL process is not there now: Python knows what else there is.
    if (event.code == Code::refused) event.code = Code::closed;
    if (event.code != Code::ok) return on_event(*pull, std::move(event));
    pool_.learn(pull->node, event.waited_s);
    NixlRead read;
    read.node = pull->node;
    read.deadline = std::min({pull->request->deadline, asked_at + answer.ttl_s, asked_at + pull->enough_s});
    read.from = std::move(answer);
    read.processor = pull->request->processor;
    for (const store::BlockRef& block : pull->blocks) {
        read.offsets.push_back(store::Store::offset_of(*block));
        read.lengths.push_back(static_cast<uint32_t>(store::Store::length_of(*block)));
    }
    read.on_event = [this, pull](IoEvent landed) { on_event(*pull, std::move(landed)); };
    if (nixl_->submit(std::move(read))) return;
    event.code = Code::closed;
    event.detail = "the NIXL processes are not connected";
    on_event(*pull, std::move(event));
}

// Blocks of a pull have come, or it is over. On the I/O thread, that of NixlReads, or the lane's.
void Lane::on_event(Pull& pull, IoEvent event) {
    if (event.ahead_bytes != 0) return send_ahead(pull, event);
    LaneEvent landed;
    landed.kind = LaneEvent::Kind::landed;
    const bool asked = pull.fd >= 0;  // else its memory was read
    if (event.final && asked && event.code == Code::ok) {
        pool_.give(pull.node, pull.slot, pull.fd, true);  // before the answer: the engine's next get may need it
    } else if (event.final && asked) {
        ::close(pull.fd);
    }
    settle_blocks(pull, event, &landed);
    if (pull.one_sided || pull.look) sched_yield();  // we may share a processor with the engine: it goes first
    if (event.final) return on_end(pull, std::move(event), std::move(landed));
    if (landed.keys.empty() && landed.rejected_keys.empty()) return;
    landed.space = pull.request->space;
    landed.node = pull.node;
    events_.push(std::move(landed));
}

// Bytes have landed that the engine may copy before they are proven: what it copies counts only if GOT says so later.
void Lane::send_ahead(Pull& pull, const IoEvent& event) {
    const Request& request = *pull.request;
    std::string body;
    msgpack::Writer writer(&body);
    writer.array(3);
    writer.uint(pull.indices[event.first]);
    writer.uint(event.ahead_bytes == 0 ? 0 : store::Store::offset_of(*pull.blocks[event.first]));
    writer.uint(event.ahead_bytes);
    pull.told_ahead = true;
    send_frame(*request.connection, frame::make(kEngineAhead, request.id, body));
}

// Commit what has come, and give it to the engine.
void Lane::settle_blocks(Pull& pull, const IoEvent& event, LaneEvent* landed) {
    Request& request = *pull.request;
    const double now = now_s();
    const size_t end = event.final ? pull.blocks.size() : pull.done + event.statuses.size();
    const size_t first = pull.done;
    std::vector<uint32_t> came;
    std::vector<std::string_view> keys;
    for (; pull.done < end; ++pull.done) {
        const uint32_t index = pull.indices[pull.done];
        const store::BlockRef& block = pull.blocks[pull.done];
        const size_t n = pull.done - first;
        const unsigned char status = n < event.statuses.size() ? event.statuses[n] : status_of(event.code);
        if (status == kOk && store_.commit(block, event.digests[n], now)) {
            came.push_back(index);
            keys.push_back(request.keys[index]);
            pull.came += 1;
            bytes_peer += store::Store::length_of(*block);
            continue;
        }
        if (status != kOk && event.token == 0) store_.abort(block);
        if (status != kOk && event.token != 0) store_.park(*block, event.token);
        pull.rejected += status == kRejected;
        if (status == kRejected) landed->rejected_keys.emplace_back(request.keys[index]);
        pull.missed += status == kMiss;
        std::lock_guard lock(request.mutex);
        request.failed[index] = status == kOk ? kLost : status;
    }
    {
        std::lock_guard lock(mutex_);
        for (size_t i = first; i < end; ++i) {
            const auto flight = flights_.find(flight_of(request.space, request.keys[pull.indices[i]]));
            if (flight == flights_.end()) continue;
            if (flight->second) {
                const unsigned char failed = request.failed[pull.indices[i]];
                landed->keys.emplace_back(request.keys[pull.indices[i]]);
                landed->statuses.push_back(failed == kUnsettled ? kOk : failed);
            }
            flights_.erase(flight);
        }
    }
    hits_peer += came.size();
    if (came.empty()) return;
    {
        std::lock_guard lock(request.connection->mutex);
        if (request.connection->closed) return;
    }
    store::Pinned pinned;
    std::vector<store::Place> places(request.keys.size());  // send_got looks them up by the request's index
    if (request.unleased && !pull.told_ahead) {
        for (size_t i = first; i < end; ++i) {
            const store::Block& block = *pull.blocks[i];
            places[pull.indices[i]] = {true, store::Store::offset_of(block), store::Store::length_of(block), 0, {}};
        }
    } else {
        pinned = store_.pin(request.space, keys, options_.lease_ttl_s, now, request.connection->holder);
        for (size_t i = 0; i < came.size(); ++i) places[came[i]] = pinned.places[i];
    }
    pinned.places = std::move(places);
    // Under the mutex until it is sent: the last part has to be the last one.
    std::lock_guard lock(request.mutex);
    for (const uint32_t index : came) request.settled[index] = 1;
    request.left -= came.size();
    send_got(request, pinned, came, kPeer, kBusy, request.left > 0);
}

void Lane::on_end(Pull& pull, IoEvent event, LaneEvent landed) {
    Request& request = *pull.request;
    pool_.learn(pull.node, event.waited_s);
    if (event.code == Code::ok && pull.fd >= 0) release_soon(pull);
    if (event.code == Code::stalled) pool_.drop(pull.node);  // its other connections will not answer either
    landed.space = request.space;
    landed.node = pull.node;
    landed.code = event.code;
    landed.final = true;
    landed.blocks = pull.came;
    landed.failed = pull.indices.size() - pull.came;
    landed.rejected = pull.rejected;
    landed.missed = pull.missed;
    landed.bytes = event.bytes;
    landed.waited_s = event.waited_s;
    landed.took_s = pull.fd < 0 ? 0 : now_s() - pull.asked_at;  // of who was not asked nothing is learned
    landed.detail = std::move(event.detail);
    const bool bad = landed.failed > 0;
    if (bad && pull.told_ahead) {  // the engine must not take these bytes for a later attempt's
        event.first = 0;
        event.ahead_bytes = 0;
        send_ahead(pull, event);
    }
    if (landed.keys.empty() && !bad) {
        events_.push_later(std::move(landed));
    } else {
        events_.push(std::move(landed));
    }
    bool rest;
    {
        std::lock_guard lock(request.mutex);
        if (bad) {
            request.failed_node = pull.node;
            request.failed_code = event.code;
        }
        rest = --request.pulls == 0 && request.left > 0;
    }
    if (rest) hand_over(request, request.failed_node, request.failed_code);
    --request.connection->in_flight;
    std::lock_guard lock(mutex_);
    pulls_.erase(pull.job);
}

// Tell the owner that we are done with its answer: a moment later where that costs nobody a wake-up, since the next request
// on that connection says the same, and the engine has its blocks first.
void Lane::release_soon(const Pull& pull) {
    if (std::this_thread::get_id() != thread_.get_id()) return pool_.settle(pull.node, pull.fd);
    const double due = now_s() + kReleaseMs / 1e3;
    if (!owed_.empty() && owed_.back().fd == pull.fd && owed_.back().node == pull.node) {
        owed_.back().due = due;
    } else {
        owed_.push_back({pull.node, pull.fd, due});
    }
}

void Lane::release_due(double now) {
    for (; !owed_.empty() && owed_.front().due <= now; owed_.pop_front()) pool_.settle(owed_.front().node, owed_.front().fd);
}

}  // namespace p2pkv
