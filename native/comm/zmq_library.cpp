#include "comm/zmq_library.h"

#include <dlfcn.h>
#include <link.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace tilerank {

namespace {

template <class Function>
bool Load(void* handle, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(handle, name));
  return *function != nullptr;
}

bool LoadAll(void* handle, ZmqLibrary* library) {
  return Load(handle, "zmq_ctx_new", &library->ctx_new) && Load(handle, "zmq_ctx_term", &library->ctx_term) && Load(handle, "zmq_ctx_set", &library->ctx_set) &&
         Load(handle, "zmq_ctx_get", &library->ctx_get) && Load(handle, "zmq_socket", &library->socket) && Load(handle, "zmq_close", &library->close) &&
         Load(handle, "zmq_setsockopt", &library->setsockopt) && Load(handle, "zmq_getsockopt", &library->getsockopt) &&
         Load(handle, "zmq_bind", &library->bind) && Load(handle, "zmq_connect", &library->connect) &&
         Load(handle, "zmq_socket_monitor", &library->socket_monitor) && Load(handle, "zmq_send", &library->send) &&
         Load(handle, "zmq_msg_init", &library->msg_init) && Load(handle, "zmq_msg_init_size", &library->msg_init_size) &&
         Load(handle, "zmq_msg_init_data", &library->msg_init_data) && Load(handle, "zmq_msg_send", &library->msg_send) &&
         Load(handle, "zmq_msg_recv", &library->msg_recv) && Load(handle, "zmq_msg_close", &library->msg_close) &&
         Load(handle, "zmq_msg_data", &library->msg_data) && Load(handle, "zmq_msg_size", &library->msg_size) &&
         Load(handle, "zmq_msg_more", &library->msg_more) && Load(handle, "zmq_curve_keypair", &library->curve_keypair) &&
         Load(handle, "zmq_z85_decode", &library->z85_decode) && Load(handle, "zmq_has", &library->has) && Load(handle, "zmq_version", &library->version) &&
         Load(handle, "zmq_errno", &library->last_error) && Load(handle, "zmq_strerror", &library->explain);
}

/// Names of what is loaded, those of addons first: a program may have another libzmq besides.
std::vector<std::string> LoadedObjects() {
  std::vector<std::string> addons;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* list) {
        if (std::string_view(info->dlpi_name).ends_with(".node")) static_cast<std::vector<std::string>*>(list)->emplace_back(info->dlpi_name);
        return 0;
      },
      &addons);
  return addons;
}

std::pair<Status, ZmqLibrary> FindOnce() {
  ZmqLibrary library = {};
  for (const std::string& name : LoadedObjects()) {
    void* handle = dlopen(name.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (handle == nullptr) continue;
    if (dlsym(handle, "zmq_msg_recv") == nullptr || !LoadAll(handle, &library)) {
      dlclose(handle);
      continue;
    }
    int major, minor, patch;
    library.version(&major, &minor, &patch);
    if (major == 4 && minor >= 3) return {Status::Ok(), library};
    return {Status(Code::kUnsupported, "the libzmq of the zeromq package is " + std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch) +
                                           ", needed is 4.3 or a later 4: `npm install zeromq@6`"),
            library};
  }
  return {Status(Code::kUnsupported,
                 "the addon of the zeromq package does not export the functions of libzmq, as its prebuilt ones do: reinstall it with `npm rebuild zeromq`, without a build "
                 "of your own that hides them"),
          library};
}

}  // namespace

Status ZmqLibrary::Find(const ZmqLibrary** library) {
  static const std::pair<Status, ZmqLibrary> found = FindOnce();
  *library = &found.second;
  return found.first;
}

}  // namespace tilerank
