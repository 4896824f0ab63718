/* bfloat16 and float16 to float and back, on integers, which every compiler vectorizes. */

#ifndef SIMAM_HALF_H
#define SIMAM_HALF_H

#include "types.h"

static INLINE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static INLINE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static INLINE float from_bfloat16(uint16_t half)
{
    return float_of((uint32_t)half << 16);
}

/* To nearest, ties to even. A NaN that comes from bfloat16 or from arithmetic has zeros in its
   lower half, so that rounding does not carry into its exponent. */
static INLINE uint16_t to_bfloat16(float value)
{
    const uint32_t bits = bits_of(value);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* The exponent's bias is 15, of float 127; infinity and NaN are 112 further away again, and
   subnormals are multiples of 2^-24. */
static INLINE float from_float16(uint16_t half)
{
    const uint32_t magnitude = half & 0x7fff, rebias = 112u << 23;
    const uint32_t normal = (magnitude << 13) + rebias + (magnitude >= 0x7c00 ? rebias : 0);
    const uint32_t subnormal = bits_of((float)(int32_t)magnitude * 0x1p-24f);
    return float_of((magnitude < 0x0400 ? subnormal : normal) | (uint32_t)(half & 0x8000) << 16);
}

/* To nearest, ties to even. Added to 1/2, whose last digit is 2^-24, a float is rounded as a
   subnormal half must be. */
static INLINE uint16_t to_float16(float value)
{
    const uint32_t sign = bits_of(value) & 0x80000000, bits = bits_of(value) ^ sign;
    const uint32_t normal = (bits + 0x0fff + (bits >> 13 & 1) - (112u << 23)) >> 13;
    const uint32_t subnormal = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
    uint32_t half = bits < 113u << 23 ? subnormal : normal;
    half = bits >= 143u << 23 ? 0x7c00 : half;
    half = bits > 0x7f800000 ? 0x7e00 : half;
    return (uint16_t)(half | sign >> 16);
}

#endif
