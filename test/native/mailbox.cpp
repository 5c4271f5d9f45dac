// Frames from the network are hostile until they were checked. What is none of this job's, or damaged, is refused and counted, and nothing of it is
// kept. What carries the job's digest and a valid check, as a rank gone mad or whoever stole the digest would send it, breaks groups at most: what
// the mailbox keeps of it has a bound, and all of that is given back.
// Built and run by native.test.ts: test_mailbox ROUNDS.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "comm/mailbox.h"

using namespace tilerank;

namespace {

constexpr uint64_t kJob = 0x123456789abcdef0;
constexpr int kWorld = 4, kWindow = 8;
constexpr size_t kFrameBytes = 4096;
enum : uint16_t { kData = 1, kGoodbye = 6, kGoodbyeSeen = 7, kLastKind = 8 };

[[noreturn]] void Die(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::_Exit(1);
}
void Expect(bool is_so, const std::string& what) {
  if (!is_so) Die(what);
}

std::shared_ptr<Mailbox> Open(int rank) {
  Mailbox::Config config;
  config.job = kJob;
  config.rank = rank;
  config.world_size = kWorld;
  config.frame_bytes = kFrameBytes;
  config.window = kWindow;
  return std::make_shared<Mailbox>(config);
}

using Bytes = std::vector<std::byte>;

/// The check as the format says it, written a second time: over the 76 bytes before it.
uint32_t CheckOf(const Bytes& message) {
  unsigned char head[sizeof(FrameHeader)] = {};
  std::memcpy(head, message.data(), sizeof head - 4);
  uint64_t hash = 0x9e3779b97f4a7c15;
  for (size_t at = 0; at < sizeof head; at += 8) {
    uint64_t word = 0;
    for (size_t i = 8; i-- > 0;) word = word << 8 | head[at + i];
    hash = (hash ^ word) * 0xbf58476d1ce4e5b9;
    hash ^= hash >> 29;
  }
  return static_cast<uint32_t>(hash >> 32);
}

FrameHeader HeadOf(const Bytes& message) {
  FrameHeader head;
  std::memcpy(&head, message.data(), sizeof head);
  return head;
}

/// What a mailbox of `rank` itself sends to `peer`, so that no layout is assumed here.
Bytes Goodbye(int rank, int peer) {
  const std::shared_ptr<Mailbox> mailbox = Open(rank);
  mailbox->SayGoodbye(peer);
  Mailbox::Outgoing out;
  Expect(mailbox->Take(&out) && out.peer == peer && out.bytes.size() == sizeof(FrameHeader), "no goodbye was said");
  return out.bytes;
}

void RefuseNoise(std::mt19937& random, int rounds) {
  const std::shared_ptr<Mailbox> mailbox = Open(0);
  for (int i = 0; i < rounds; i++) {
    Bytes message(random() % 3 == 0 ? random() % sizeof(FrameHeader) : random() % 4300);
    for (size_t at = 0; at < std::min<size_t>(message.size(), 96); at++) message[at] = static_cast<std::byte>(random());
    // Half of them look like frames up to some field.
    if (message.size() >= sizeof(FrameHeader) && random() % 2 == 0) {
      FrameHeader head = HeadOf(message);
      const FrameHeader real = HeadOf(Goodbye(1, 0));
      head.magic = real.magic;
      head.version = real.version;
      head.kind = static_cast<uint16_t>(random() % 10);
      if (random() % 2 == 0) head.job = kJob;
      std::memcpy(message.data(), &head, sizeof head);
    }
    Expect(!mailbox->Deliver(message.data(), message.size(), 1), "noise was kept");
  }
  Expect(mailbox->refused() == static_cast<uint64_t>(rounds), "noise was not counted");
  Mailbox::Outgoing out;
  Expect(!mailbox->Take(&out), "noise was answered");
}

void RefuseDamage() {
  const std::shared_ptr<Mailbox> mailbox = Open(0);
  const auto deliver = [&](const Bytes& message) { Expect(!mailbox->Deliver(message.data(), message.size(), 1), "a refused message was kept"); };
  deliver(Goodbye(0, 1));  // of this very rank
  const Bytes theirs = Goodbye(1, 0);
  Expect(HeadOf(theirs).check == CheckOf(theirs), "the check is not over what stands before it");
  for (size_t bit = 0; bit < 8 * theirs.size(); bit++) {
    Bytes damaged = theirs;
    damaged[bit / 8] ^= static_cast<std::byte>(1 << bit % 8);
    deliver(damaged);
  }
  Bytes longer = theirs;
  longer.resize(theirs.size() + 1);
  deliver(longer);
  deliver(Bytes(theirs.begin(), theirs.end() - 1));
  Expect(mailbox->refused() == 3 + 8 * theirs.size(), "not all of them were refused");
  Mailbox::Outgoing out;
  Expect(!mailbox->Take(&out), "one of them was answered");
  deliver(theirs);
  Expect(mailbox->refused() == 3 + 8 * theirs.size() && mailbox->Take(&out) && out.peer == 1, "the true one was not answered");
}

/// Messages with the digest and a valid check, all else as chance will have it, for streams that are open, closed, and unknown.
void SurviveForgeries(std::mt19937& random) {
  const std::shared_ptr<Mailbox> mailbox = Open(0);
  int failures = 0;
  const auto on_failure = [&](Status, int culprit, const char* operation, uint64_t) {
    Expect(culprit >= -1 && culprit < kWorld && operation != nullptr, "a failure names nobody that there could be");
    failures++;
  };
  std::vector<std::shared_ptr<Mailbox::Stream>> streams(3);
  Expect(mailbox->Open(1, {-1, 1, 2, 3}, 0, on_failure, &streams[0]).ok(), "a stream does not open");
  Expect(mailbox->Open(2, {2, -1}, 1, on_failure, &streams[1]).ok(), "a stream does not open");
  Expect(mailbox->Open(3, {-1, 3}, 0, on_failure, &streams[2]).ok(), "a stream does not open");
  streams[2].reset();

  const FrameHeader real = HeadOf(Goodbye(1, 0));
  std::map<uint64_t, Bytes> kept;
  uint64_t keep = 1;
  size_t most = 0;
  const auto drop = [&] {
    std::vector<uint64_t> released;
    mailbox->TakeReleased(&released);
    for (uint64_t one : released) Expect(kept.erase(one) == 1, "something was given back twice, or never kept");
  };
  const auto small = [&](uint64_t most_of) { return random() % 4 == 0 ? static_cast<uint64_t>(random()) << 32 | random() : random() % most_of; };
  for (int i = 0; i < 3000; i++) {
    FrameHeader head = real;
    head.kind = static_cast<uint16_t>(random() % 2 == 0 ? +kData : 1 + random() % kLastKind);
    head.stream = random() % 8 == 0 ? small(4000) : 1 + random() % 4;
    head.number = small(20);
    head.taken = small(20);
    head.tag = small(1 << 16);
    head.count = small(1 << 20);
    head.operation = small(10);
    head.source = 1 + random() % (kWorld - 1);
    head.part = static_cast<uint32_t>(small(100));
    head.nbytes = random() % 4 == 0 ? sizeof(FailureNote) : random() % (kFrameBytes + 1);
    Bytes message(sizeof head + head.nbytes);
    for (size_t at = sizeof head; at < message.size(); at++) message[at] = static_cast<std::byte>(random());
    std::memcpy(message.data(), &head, sizeof head);
    head.check = CheckOf(message);
    std::memcpy(message.data(), &head, sizeof head);
    // Where it lies is known before it is delivered, and it goes when it may: AddressSanitizer sees who reads it afterwards.
    const uint64_t own = keep++;
    const Bytes& lying = kept[own] = std::move(message);
    if (!mailbox->Deliver(lying.data(), lying.size(), own)) kept.erase(own);
    drop();
    most = std::max(most, kept.size());
    // A rank that is in an operation, reads what it can, and sends.
    for (size_t s = 0; s < 2; s++) {
      Mailbox::Stream& stream = *streams[s];
      const int peer = s == 0 ? 1 + static_cast<int>(random() % 3) : 0;
      Frame frame;
      if (random() % 4 == 0 && stream.Poll(peer, &frame)) {
        unsigned sum = 0;
        for (size_t at = 0; at < frame.nbytes; at++) sum += static_cast<unsigned>(frame.data[at]);
        Expect(frame.nbytes <= kFrameBytes && sum != ~0u, "a frame is longer than a frame");
        stream.Release(peer);
      }
      if (std::byte* room = stream.Reserve(peer); random() % 8 == 0 && room != nullptr) {
        std::memset(room, 1, kFrameBytes);
        stream.Post(peer, FrameTag(), kFrameBytes);
      }
      static_cast<void>(stream.HasLeft(peer));
      static_cast<void>(stream.IsRenewing(peer));
      char shown[200];
      static_cast<void>(stream.ShownBy(peer, shown, sizeof shown));
    }
    Mailbox::Outgoing out;
    while (mailbox->Take(&out)) Expect(out.peer >= 0 && out.peer < kWorld && out.nbytes <= mailbox->message_bytes(), "something is sent to nobody");
  }
  // Of each peer a window for each open stream, and for as many early streams as a mailbox remembers.
  const size_t bound = 2 * kWorld * kWindow + 64 * kWorld * (kWindow + 8);
  Expect(most <= bound, std::to_string(most) + " messages were kept at a time, " + std::to_string(bound) + " at most should be");
  Expect(failures > 0, "no group was broken by any of this");
  streams.clear();
  drop();
  // What is left waits for streams that this rank may still open; it goes with them.
  for (uint64_t id = 1; id < 4100; id++) {
    std::shared_ptr<Mailbox::Stream> stream;
    Expect(mailbox->Open(id, {-1, 1, 2, 3}, 0, on_failure, &stream).ok(), "a stream does not open again");
  }
  drop();
  mailbox->Stop();
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 20;
  RefuseDamage();
  for (int round = 0; round < rounds; round++) {
    std::mt19937 random(static_cast<uint32_t>(round) + 1);
    RefuseNoise(random, 1000);
    SurviveForgeries(random);
  }
  std::printf("ok, %d rounds\n", rounds);
}
