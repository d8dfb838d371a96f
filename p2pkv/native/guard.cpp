#include "guard.hpp"

#include <csetjmp>
#include <csignal>
#include <cstring>

#include <algorithm>
#include <mutex>

#include "copy.hpp"

namespace p2pkv {
namespace {

// Half of a typical L2: the piece is still there when the hash reads it back.
constexpr size_t kPiece = 256 << 10;
constexpr size_t kAwayBytes = 512 << 10;  // more than this does not stay in a core's own cache anyway

// volatile: only the signal handler reads it, so the compiler would otherwise drop the stores.
thread_local sigjmp_buf* volatile armed = nullptr;
struct sigaction previous {};
std::mutex install_mutex;

void on_sigbus(int signal_number, siginfo_t* info, void* context) {
    if (armed != nullptr) siglongjmp(*armed, 1);
    // Pass it on once: who gets it may pass it back (Python's faulthandler restores the handler it found, perhaps ours).
    static volatile std::sig_atomic_t passed_on = 0;
    if (passed_on != 0) {
        std::signal(SIGBUS, SIG_DFL);
        return;
    }
    passed_on = 1;
    if ((previous.sa_flags & SA_SIGINFO) != 0 && previous.sa_sigaction != nullptr) {
        previous.sa_sigaction(signal_number, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(signal_number);
    } else {
        std::signal(SIGBUS, SIG_DFL);  // returning re-runs the faulting access, which then ends the process as usual
    }
}

// Others (Python's faulthandler) may install their own handler after ours, so look each time: one cheap system call.
void ensure_handler() {
    struct sigaction now {};
    sigaction(SIGBUS, nullptr, &now);
    if ((now.sa_flags & SA_SIGINFO) != 0 && now.sa_sigaction == on_sigbus) return;
    std::lock_guard lock(install_mutex);
    struct sigaction ours {};
    ours.sa_sigaction = on_sigbus;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER;  // NODEFER: leaving by siglongjmp must not leave SIGBUS blocked
    sigemptyset(&ours.sa_mask);
    sigaction(SIGBUS, &ours, &now);
    if (!((now.sa_flags & SA_SIGINFO) != 0 && now.sa_sigaction == on_sigbus)) previous = now;
}

// No object with a destructor may live in a frame that siglongjmp leaves: these bodies are plain.
bool run_guarded(void (*body)(void*), void* argument) {
    ensure_handler();
    sigjmp_buf here;
    sigjmp_buf* outer = armed;
    if (sigsetjmp(here, 0) != 0) {
        armed = outer;
        return false;
    }
    armed = &here;
    body(argument);
    armed = outer;
    return true;
}

struct Job {
    char* dst;
    const char* src;
    size_t length;
    CopyDeadline deadline;
    HashState* state;
    bool expired;
    bool away = false;
};

bool expired(Job* job) {
    job->expired = job->deadline != CopyDeadline::max() && std::chrono::steady_clock::now() >= job->deadline;
    return job->expired;
}

void copy_body(void* argument) {
    auto* job = static_cast<Job*>(argument);
    const auto copy = job->away ? copy_away : copy_bytes;
    for (size_t done = 0; done < job->length && !expired(job); done += kPiece)
        copy(job->dst + done, job->src + done, std::min(kPiece, job->length - done));
}

void copy_hash_body(void* argument) {
    auto* job = static_cast<Job*>(argument);
    const HashOps& ops = hash_ops();
    for (size_t done = 0; done < job->length && !expired(job); done += kPiece) {
        const size_t n = std::min(kPiece, job->length - done);
        copy_bytes(job->dst + done, job->src + done, n);
        ops.update(job->state, job->dst + done, n);
    }
}

void hash_body(void* argument) {
    auto* job = static_cast<Job*>(argument);
    hash_ops().update(job->state, job->src, job->length);
}

}  // namespace

bool guarded_copy(void* dst, const void* src, size_t length, CopyDeadline deadline) {
    return guarded_copy(dst, src, length, deadline, length >= kAwayBytes);
}

bool guarded_copy(void* dst, const void* src, size_t length, CopyDeadline deadline, bool away) {
    Job job{static_cast<char*>(dst), static_cast<const char*>(src), length, deadline, nullptr, false, away};
    return run_guarded(copy_body, &job) && !job.expired;
}

bool guarded_copy_hash(void* dst, const void* src, size_t length, CopyDeadline deadline, Digest* digest) {
    HashState state;
    hash_ops().reset(&state);
    Job job{static_cast<char*>(dst), static_cast<const char*>(src), length, deadline, &state, false};
    if (!run_guarded(copy_hash_body, &job) || job.expired) return false;
    *digest = hash_ops().digest(&state);
    return true;
}

bool guarded_hash(const void* src, size_t length, Digest* digest) {
    HashState state;
    hash_ops().reset(&state);
    Job job{nullptr, static_cast<const char*>(src), length, CopyDeadline::max(), &state, false};
    if (!run_guarded(hash_body, &job)) return false;
    *digest = hash_ops().digest(&state);
    return true;
}

}  // namespace p2pkv
