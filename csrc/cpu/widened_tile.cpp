// The tile for each instruction set, and the choice between them at run time.

#include "cpu/widened_tile.h"

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moe_unlearn {

#if defined(__x86_64__)

namespace {

/// What multiplies a tile of some number of rows and vectors (widened_vectors.h).
using Tile = void (*)(const Sums&, const float*, const float*, int64_t, Ahead&);

namespace avx512 {

#define MOE_UNLEARN_TILE __attribute__((target("avx512f,avx512bw")))
using Vector = __m512;
constexpr int width = 16, tile_rows = 14;
MOE_UNLEARN_TILE inline Vector zero() { return _mm512_setzero_ps(); }
MOE_UNLEARN_TILE inline Vector broadcast(float x) { return _mm512_set1_ps(x); }
MOE_UNLEARN_TILE inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
MOE_UNLEARN_TILE inline Vector load(const Bits16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  // masks of ones: GCC 12 warns of an undefined value in the forms without
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xFFFF, _mm512_maskz_cvtepu16_epi32(0xFFFF, bits), 16));
}
MOE_UNLEARN_TILE inline void store(float* to, Vector x) { _mm512_storeu_ps(to, x); }
MOE_UNLEARN_TILE inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

/// The bits of x, of which the upper 16 are those of x in bfloat16; of NaNs too where there may be some.
MOE_UNLEARN_TILE inline __m512i round_bits(Vector x, bool nans) {
  const __m512i bits = _mm512_castps_si512(x), down = _mm512_set1_epi32(0x7FFF), up = _mm512_set1_epi32(0x8000);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_mask_blend_epi32(odd, down, up));
  if (__builtin_expect(!nans, 1)) return sum;
  return _mm512_mask_mov_epi32(sum, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
}

MOE_UNLEARN_TILE inline void store_rounded(Bits16* to, Vector a, Vector b, bool streams) {
  alignas(64) static constexpr uint16_t upper[] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                   33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const bool nans = _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) != 0;
  const __m512i x = round_bits(a, nans), y = round_bits(b, nans);
  const __m512i both = _mm512_permutex2var_epi16(x, _mm512_load_si512(upper), y);
  if (streams)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), both);
  else
    _mm512_storeu_si512(to, both);
}

#include "cpu/widened_vectors.h"
#undef MOE_UNLEARN_TILE

}  // namespace avx512

namespace avx2 {

#define MOE_UNLEARN_TILE __attribute__((target("avx2,fma")))
using Vector = __m256;
constexpr int width = 8, tile_rows = 6;
MOE_UNLEARN_TILE inline Vector zero() { return _mm256_setzero_ps(); }
MOE_UNLEARN_TILE inline Vector broadcast(float x) { return _mm256_set1_ps(x); }
MOE_UNLEARN_TILE inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
MOE_UNLEARN_TILE inline Vector load(const Bits16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
MOE_UNLEARN_TILE inline void store(float* to, Vector x) { _mm256_storeu_ps(to, x); }
MOE_UNLEARN_TILE inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

/// x in bfloat16, as integers of 32 bits.
MOE_UNLEARN_TILE inline __m256i round_bits(Vector x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7FC00000), nan), 16);
}

// half of a cache line is not worth a way past the cache
MOE_UNLEARN_TILE inline void store_rounded(Bits16* to, Vector a, Vector b, bool) {
  const __m256i lanes = _mm256_packus_epi32(round_bits(a), round_bits(b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(lanes, 0xD8));
}

#include "cpu/widened_vectors.h"
#undef MOE_UNLEARN_TILE

}  // namespace avx2

}  // namespace

void end_streams() { _mm_sfence(); }

int64_t tile_rows() {
  return instruction_set() == InstructionSet::avx512 ? avx512::tile_rows : avx2::tile_rows;
}

void multiply_tile(
    const Sums& to, const float* strip, int64_t rows, const float* panel, int64_t columns, int64_t depth,
    Ahead& ahead) {
  const auto tile = instruction_set() == InstructionSet::avx512 ? avx512::multiply_tile : avx2::multiply_tile;
  tile(to, strip, rows, panel, columns, depth, ahead);
}

void widen_words(float* to, int64_t to_stride, const Matrix& from) {
  (instruction_set() == InstructionSet::avx512 ? avx512::widen_words : avx2::widen_words)(to, to_stride, from);
}

#else  // a CPU on which nothing widens (widens_products)

int64_t tile_rows() { return 1; }
void multiply_tile(const Sums&, const float*, int64_t, const float*, int64_t, int64_t, Ahead&) {}
void widen_words(float*, int64_t, const Matrix&) {}
void end_streams() {}

#endif

}  // namespace moe_unlearn
