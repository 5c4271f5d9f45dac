// One fault of each kind that a sanitizer of native.test.ts must report, so that their silence about the other programs means something.
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

int main(int argc, char** argv) {
  const std::string fault = argc > 1 ? argv[1] : "";
  int number = argc;
  if (fault == "data race") {
    std::thread other([&] { number++; });
    number++;
    other.join();
  } else if (fault == "read past an end") {
    std::vector<int> numbers(static_cast<size_t>(argc));
    int* end = numbers.data() + argc;
    number = *end;
  } else if (fault == "integer overflow") {
    number += 0x7fffffff;
  }
  std::printf("nobody minds: %d\n", number);
}
