// The mark of functions that are written once for host and device.
#pragma once

#if defined(__CUDACC__)
#define CUTLOSS_HOST_DEVICE __host__ __device__
#else
#define CUTLOSS_HOST_DEVICE
#endif
