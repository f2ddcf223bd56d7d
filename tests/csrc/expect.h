#pragma once

#include <cstdio>

// EXPECT(condition, printf-format, values...): counts and prints what does not hold. main returns
// `failures() != 0`.
inline int& failures() {
  static int count = 0;
  return count;
}

#define EXPECT(condition, ...)                                    \
  do {                                                            \
    if (!(condition) && ++failures() <= 20) {                     \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (0)
