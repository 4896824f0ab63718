/* Runs the CPU kernel for another process: reads jobs from the standard input and writes results to
   the standard output; see remote_kernel.py. Compiled together with simam_cpu.c. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int simam_forward(const void *x, void *out, int64_t samples, int64_t channels, int64_t positions,
                  double e_lambda, int dtype, int channels_last, int leave_one_out,
                  void *parallel_for, int threads);
int simam_backward(const void *dy, const void *x, void *dx, int64_t samples, int64_t channels,
                   int64_t positions, double e_lambda, int dtype, int channels_last,
                   int leave_one_out, void *parallel_for, int threads);

typedef struct {
    int64_t bytes, backward, samples, channels, positions;
    double e_lambda;
    int64_t dtype, channels_last, leave_one_out;
} Request;

static void *read_tensor(int64_t bytes)
{
    void *data = malloc((size_t)bytes + 1);
    if (!data || fread(data, 1, (size_t)bytes, stdin) != (size_t)bytes)
        exit(1);
    return data;
}

int main(void)
{
    Request r;
    while (fread(&r, sizeof r, 1, stdin) == 1) {
        void *x = read_tensor(r.bytes), *dy = r.backward ? read_tensor(r.bytes) : NULL;
        void *out = malloc((size_t)r.bytes + 1);
        if (!out)
            return 1;
        const int dtype = (int)r.dtype, last = (int)r.channels_last, loo = (int)r.leave_one_out;
        const int error = r.backward
                              ? simam_backward(dy, x, out, r.samples, r.channels, r.positions,
                                               r.e_lambda, dtype, last, loo, NULL, 1)
                              : simam_forward(x, out, r.samples, r.channels, r.positions,
                                              r.e_lambda, dtype, last, loo, NULL, 1);
        if (error || fwrite(out, 1, (size_t)r.bytes, stdout) != (size_t)r.bytes || fflush(stdout))
            return 1;
        free(x), free(dy), free(out);
    }
    return 0;
}
