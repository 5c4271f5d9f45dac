// The C interface of libzmq, of the very copy that the `zeromq` package has loaded: its addon carries the library and exports its functions. So
// frames go through that library without passing through JavaScript (zmq_courier.h), and nothing has to be installed beside it.
// Declarations and numbers are those of libzmq's manual pages (api.zeromq.org, 4.3).
#pragma once
#include <cstddef>
#include <cstdint>

#include "status.h"

namespace tilerank {

/// zmq_msg_t: opaque.
struct alignas(8) ZmqMessage {
  unsigned char bytes[64];
};

struct ZmqLibrary {
  // Kinds of sockets; options of contexts, of sockets, of sending and receiving; events of monitors.
  static constexpr int kPair = 0, kReply = 4, kPull = 7, kPush = 8;
  static constexpr int kMaxSockets = 2, kSocketLimit = 3;
  static constexpr int kFd = 14, kLinger = 17, kMaxMessageSize = 22, kSendHighWaterMark = 23, kReceiveHighWaterMark = 24, kLastEndpoint = 32, kIpv6 = 42,
                       kCurveServer = 47, kCurvePublicKey = 48, kCurveSecretKey = 49, kCurveServerKey = 50, kZapDomain = 55, kHandshakeInterval = 66,
                       kHeartbeatInterval = 75, kHeartbeatTimeToLive = 76, kHeartbeatTimeout = 77, kZapEnforceDomain = 93;
  static constexpr int kDontWait = 1, kSendMore = 2;
  static constexpr int kDisconnected = 0x0200, kHandshakeFailed = 0x0800, kHandshakeSucceeded = 0x1000, kHandshakeProtocol = 0x2000, kHandshakeRefused = 0x4000;
  static constexpr size_t kKeyText = 41;  // of CURVE, in Z85, with the zero at its end
  static constexpr size_t kKeyBytes = 32;

  void* (*ctx_new)();
  int (*ctx_term)(void* context);
  int (*ctx_set)(void* context, int option, int value);
  int (*ctx_get)(void* context, int option);
  void* (*socket)(void* context, int type);
  int (*close)(void* socket);
  int (*setsockopt)(void* socket, int option, const void* value, size_t nbytes);
  int (*getsockopt)(void* socket, int option, void* value, size_t* nbytes);
  int (*bind)(void* socket, const char* endpoint);
  int (*connect)(void* socket, const char* endpoint);
  int (*socket_monitor)(void* socket, const char* endpoint, int events);
  int (*send)(void* socket, const void* data, size_t nbytes, int flags);
  int (*msg_init)(ZmqMessage* message);
  int (*msg_init_size)(ZmqMessage* message, size_t nbytes);
  int (*msg_init_data)(ZmqMessage* message, void* data, size_t nbytes, void (*release)(void* data, void* hint), void* hint);
  int (*msg_send)(ZmqMessage* message, void* socket, int flags);
  int (*msg_recv)(ZmqMessage* message, void* socket, int flags);
  int (*msg_close)(ZmqMessage* message);
  void* (*msg_data)(ZmqMessage* message);
  size_t (*msg_size)(const ZmqMessage* message);
  int (*msg_more)(const ZmqMessage* message);
  int (*curve_keypair)(char* public_key, char* secret_key);
  uint8_t* (*z85_decode)(uint8_t* bytes, const char* text);
  int (*has)(const char* capability);
  void (*version)(int* major, int* minor, int* patch);
  int (*last_error)();
  const char* (*explain)(int error);

  /// Finds it among what this process has loaded; kUnsupported where nothing loaded has it. It is never unloaded afterwards.
  static Status Find(const ZmqLibrary** library);
};

}  // namespace tilerank
