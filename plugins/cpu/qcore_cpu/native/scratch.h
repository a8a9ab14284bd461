// Scratch that is kept from one call to the next, cut into arrays that begin at lines of the cache.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace qcore {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // Makes room for arrays of so many bytes in all, `arrays` of them; what was there is gone.
  void begin(int64_t bytes, int arrays) {
    used_ = 0;
    bytes += arrays * kLine;
    if (bytes <= size_) return;
    std::free(memory_);
    size_ = rounded(bytes);
    memory_ = static_cast<char*>(std::aligned_alloc(kLine, size_));
    if (!memory_) {
      size_ = 0;
      throw std::bad_alloc();
    }
  }
  // Gives back what is too much to keep.
  void end() {
    if (size_ <= kKept) return;
    std::free(memory_);
    memory_ = nullptr;
    size_ = 0;
  }
  template <class T>
  void take(T*& array, int64_t count) {
    array = count ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += rounded(count * static_cast<int64_t>(sizeof(T)));
  }

 private:
  static constexpr int64_t kLine = 64, kKept = 4 << 20;
  static int64_t rounded(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

  char* memory_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

}  // namespace qcore
