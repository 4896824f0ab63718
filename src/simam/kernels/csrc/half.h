/* Conversions between float and bfloat16 or float16, in integer arithmetic that every compiler
   vectorizes. */

#ifndef SIMAM_HALF_H
#define SIMAM_HALF_H

#include "types.h"

static INLINE uint32_t float_to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static INLINE float bits_to_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static INLINE float bfloat16_to_float(uint16_t half)
{
    return bits_to_float((uint32_t)half << 16);
}

/* Rounds to nearest, ties to even. The lower 16 bits of a NaN that comes from bfloat16 or from
   arithmetic are zero, so rounding does not carry into its exponent. */
static INLINE uint16_t float_to_bfloat16(float value)
{
    const uint32_t bits = float_to_bits(value);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* The exponent bias is 15 in float16 and 127 in float, so finite values add 112 to the exponent;
   infinity and NaN add 112 twice. Subnormals are multiples of 2^-24. */
static INLINE float float16_to_float(uint16_t half)
{
    const uint32_t magnitude = half & 0x7fff, rebias = 112u << 23;
    const uint32_t normal = (magnitude << 13) + rebias + (magnitude >= 0x7c00 ? rebias : 0);
    const uint32_t subnormal = float_to_bits((float)(int32_t)magnitude * 0x1p-24f);
    return bits_to_float((magnitude < 0x0400 ? subnormal : normal) |
                         (uint32_t)(half & 0x8000) << 16);
}

/* Rounds to nearest, ties to even. The last digit of 1/2 as a float is worth 2^-24, the unit of
   subnormal float16 numbers, so adding 1/2 rounds a float as a subnormal float16. */
static INLINE uint16_t float_to_float16(float value)
{
    const uint32_t sign = float_to_bits(value) & 0x80000000, bits = float_to_bits(value) ^ sign;
    const uint32_t normal = (bits + 0x0fff + (bits >> 13 & 1) - (112u << 23)) >> 13;
    const uint32_t subnormal = float_to_bits(bits_to_float(bits) + 0.5f) - float_to_bits(0.5f);
    uint32_t half = bits < 113u << 23 ? subnormal : normal;
    half = bits >= 143u << 23 ? 0x7c00 : half;
    half = bits > 0x7f800000 ? 0x7e00 : half;
    return (uint16_t)(half | sign >> 16);
}

#endif
