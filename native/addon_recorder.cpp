// The flight recorder for JavaScript: recordings as plain objects, and class Archive, which a launcher keeps for its job.
#include <algorithm>
#include <memory>

#include "addon.h"
#include "comm/archive.h"
#include "comm/communicator.h"

namespace tilerank {

namespace {

Napi::Object ToObject(Napi::Env env, const RecordRow& row) {
  const OpTag tag = OpTag::FromBits(row.tag, row.count);
  Napi::Object object = Napi::Object::New(env);
  object.Set("sequence", static_cast<double>(row.sequence));
  object.Set("operation", NameOf(tag.op));
  object.Set("dtype", NameOf(tag.dtype));
  object.Set("count", static_cast<double>(row.count));
  object.Set("variant", tag.variant);
  object.Set("history", tag.detail);
  object.Set("step", row.step);
  object.Set("layer", row.layer);
  object.Set("publishedNs", static_cast<double>(row.published_ns));
  object.Set("completedNs", static_cast<double>(row.completed_ns));
  return object;
}

class ArchiveHandle : public Napi::ObjectWrap<ArchiveHandle> {
 public:
  static Napi::Function Define(Napi::Env env) {
    return DefineClass(env, "Archive", {InstanceMethod("read", &ArchiveHandle::Read), InstanceMethod("close", &ArchiveHandle::CloseJs)});
  }

  /// new Archive(nonce, worldSize): listens for the ranks' arenas from now on.
  explicit ArchiveHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<ArchiveHandle>(info) {
    const Napi::Env env = info.Env();
    if (info.Length() < 2 || !info[0].IsString() || !info[1].IsNumber()) {
      ToError(env, Status(Code::kInvalidArgument, "Archive takes (nonce, worldSize)")).ThrowAsJavaScriptException();
      return;
    }
    Status status = Archive::Open(info[0].As<Napi::String>().Utf8Value(), info[1].As<Napi::Number>().Int32Value(), &archive_);
    if (!status.ok()) {
      ToError(env, status).ThrowAsJavaScriptException();
      return;
    }
    napi_add_env_cleanup_hook(env, &ArchiveHandle::AtExit, this);
  }
  ~ArchiveHandle() { Close(); }

 private:
  Napi::Value Read(const Napi::CallbackInfo& info) {
    const size_t limit = info.Length() > 0 && info[0].IsNumber() ? info[0].As<Napi::Number>().Uint32Value() : kRecords;
    return ToArray(info.Env(), archive_ == nullptr ? std::vector<RankRecording>() : archive_->Read(limit));
  }
  Napi::Value CloseJs(const Napi::CallbackInfo& info) {
    Close();
    return info.Env().Undefined();
  }
  void Close() {
    if (archive_ == nullptr) return;
    napi_remove_env_cleanup_hook(Env(), &ArchiveHandle::AtExit, this);
    archive_.reset();
  }
  static void AtExit(void* self) { static_cast<ArchiveHandle*>(self)->archive_.reset(); }

  std::unique_ptr<Archive> archive_;
};

}  // namespace

Napi::Array ToArray(Napi::Env env, const std::vector<RankRecording>& recordings) {
  Napi::Array array = Napi::Array::New(env, recordings.size());
  for (size_t i = 0; i < recordings.size(); i++) {
    const RankRecording& recording = recordings[i];
    Napi::Array rows = Napi::Array::New(env, recording.rows.size());
    for (size_t k = 0; k < recording.rows.size(); k++) rows.Set(static_cast<uint32_t>(k), ToObject(env, recording.rows[k]));
    Napi::Object object = Napi::Object::New(env);
    object.Set("rank", recording.rank);
    object.Set("group", static_cast<double>(recording.group));
    object.Set("pid", static_cast<double>(recording.pid));
    object.Set("rows", rows);
    array.Set(static_cast<uint32_t>(i), object);
  }
  return array;
}

void RegisterRecorder(Napi::Env env, Napi::Object exports) { exports.Set("Archive", ArchiveHandle::Define(env)); }

}  // namespace tilerank
