// Where the others find what a rank gives them: in its slot, piece by piece, or - where it is a tensor of the group and large enough - in
// the tensor itself, all of it at once, so that one copy takes the place of two. Each rank decides that for itself and says so in the payload
// of its first flag; ranks with tensors and ranks with other memory meet in one call.
//
// Whoever reads from a tensor says Consumed of the call's last sequence when it is through, and so does whoever publishes no more
// sequences of the call; the owner of the tensor waits for that before its call ends, as the user may write the tensor from then on.
#pragma once
#include "comm/operation.h"

namespace tilerank {

/// Whether flags of this call say where data lies: from what all ranks have alike. `nbytes`: that a reader takes from one rank.
inline bool SaysSource(const OperationContext& context, size_t nbytes) { return nbytes >= context.from_tensor_bytes; }

/// True when this rank gives a tensor.
inline bool IsFromTensor(const OperationContext& context, const Operation& operation, size_t nbytes) {
  return operation.source != 0 && SaysSource(context, nbytes);
}

/// The first publish of a rank: with the tensor that it gives, or that it takes from others.
inline void PublishTensor(const OperationContext& context, const Operation& operation, size_t nbytes, uint32_t tensor, const OpTag& tag) {
  if (!SaysSource(context, nbytes)) return context.fabric->Publish(context.lane, operation.sequence, tag);
  FlagPayload payload;
  payload.words[0] = tensor;
  context.fabric->Publish(context.lane, operation.sequence, tag, payload);
}

inline void PublishSource(const OperationContext& context, const Operation& operation, size_t nbytes, const OpTag& tag) {
  PublishTensor(context, operation, nbytes, operation.source, tag);
}

/// *data: the tensor that a peer gives, once its first flag has been awaited; null when its slot holds the first piece.
inline Status FindSource(const OperationContext& context, const Operation& operation, size_t nbytes, int peer, const Deadline& deadline,
                         std::byte** data) {
  *data = nullptr;
  if (!SaysSource(context, nbytes)) return Status::Ok();
  const auto id = static_cast<uint32_t>(context.fabric->PayloadOf(peer, context.lane, operation.sequence).words[0]);
  return id == 0 ? Status::Ok() : context.tensors->Find(id, peer, deadline, data);
}

/// The same of all peers, in operations in which all ranks publish. *some, *all: ranks that give tensors, this one among them.
inline Status FindSources(const OperationContext& context, const Operation& operation, size_t nbytes, const Deadline& deadline,
                          std::byte** sources, bool* some, bool* all) {
  const Fabric& comm = *context.fabric;
  *some = *all = IsFromTensor(context, operation, nbytes);
  for (int peer = 0; peer < comm.world_size(); peer++) {
    if (peer == comm.rank()) continue;
    if (Status s = FindSource(context, operation, nbytes, peer, deadline, &sources[peer]); !s.ok()) [[unlikely]] return s;
    *some |= sources[peer] != nullptr;
    *all &= sources[peer] != nullptr;
  }
  return Status::Ok();
}

/// The end of such an operation, if some rank gave a tensor.
inline Status EndSources(const OperationContext& context, const Operation& operation, size_t nbytes, uint64_t last, const Deadline& deadline) {
  context.fabric->Consumed(context.lane, last);
  for (int peer = 0; IsFromTensor(context, operation, nbytes) && peer < context.fabric->world_size(); peer++) {
    if (peer == context.fabric->rank()) continue;
    Status s = context.fabric->AwaitConsumedBy(context.lane, last, peer, NameOf(operation.op), deadline);
    if (!s.ok()) [[unlikely]] return s;
  }
  return Status::Ok();
}

}  // namespace tilerank
