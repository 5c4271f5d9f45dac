// The mailbox of a rank as JavaScript sees it: made in the thread of the group, served in the worker that owns the sockets.
#pragma once
#include <napi.h>

#include <memory>

#include "comm/mailbox.h"

namespace tilerank {

/// Of an object that `new Mailbox()` made; null for anything else.
std::shared_ptr<Mailbox> MailboxOf(const Napi::Value& value);

}  // namespace tilerank
