/* Preloaded into a program, this hides instruction sets of the CPU from it and from all that it starts.
 *
 * The matrix products of ONNX Runtime (MLAS) have no switch for it: they ask the CPU. Linux can have the instruction
 * CPUID fault (arch_prctl ARCH_SET_CPUID; most Intel CPUs since 2012, AMD since Zen 4), and the handler answers
 * without the bits. DYDIT_HIDE says what goes: `avx512` (AVX-512, VNNI and AMX, so that AVX2 and FMA are left), or
 * `vnni` (VNNI and AMX alone).
 *
 * Exit code 77 where the system has no such fault. The handler of SIGSEGV must stay: pytest wants -p no:faulthandler,
 * and programs with a handler of their own (the compiler of g++, so torch.compile) fail under it.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define BIT(n) (1u << (n))

static int only_vnni;

static int faulting(int on) { return (int)syscall(SYS_arch_prctl, ARCH_SET_CPUID, !on); }

/* Leaf 7, where all of these are; the names are Linux's. */
static void hide(unsigned subleaf, unsigned *eax, unsigned *ebx, unsigned *ecx, unsigned *edx) {
  const unsigned amx = BIT(22) | BIT(24) | BIT(25); /* amx_bf16, amx_tile, amx_int8 */
  if (subleaf == 1) {
    *eax &= ~(BIT(4) | BIT(21));                      /* avx_vnni, amx_fp16 */
    *edx &= ~(BIT(4) | BIT(8) | BIT(10) | BIT(19));   /* avx_vnni_int8, amx_complex, avx_vnni_int16, avx10 */
    if (!only_vnni) *eax &= ~(BIT(5) | BIT(23));      /* avx512_bf16, avx_ifma */
  }
  if (subleaf != 0) return;
  *ecx &= ~BIT(11); /* avx512_vnni */
  *edx &= ~amx;
  if (only_vnni) return;
  *ebx &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31)); /* f dq ifma pf er cd bw vl */
  *ecx &= ~(BIT(1) | BIT(6) | BIT(12) | BIT(14));  /* vbmi, vbmi2, bitalg, vpopcntdq */
  *edx &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(23));   /* 4vnniw, 4fmaps, vp2intersect, fp16 */
}

static void answer(int signal_number, siginfo_t *info, void *context) {
  greg_t *g = ((ucontext_t *)context)->uc_mcontext.gregs;
  const unsigned char *code = (const unsigned char *)g[REG_RIP];
  if (info->si_code != SI_KERNEL || code[0] != 0x0f || code[1] != 0xa2) { /* no CPUID: a real fault */
    signal(signal_number, SIG_DFL);
    return;
  }
  unsigned leaf = (unsigned)g[REG_RAX], subleaf = (unsigned)g[REG_RCX], a, b, c, d;
  faulting(0);
  __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(leaf), "c"(subleaf));
  faulting(1);
  if (leaf == 7) hide(subleaf, &a, &b, &c, &d);
  g[REG_RAX] = a, g[REG_RBX] = b, g[REG_RCX] = c, g[REG_RDX] = d, g[REG_RIP] += 2;
}

__attribute__((constructor(101))) static void begin(void) {
  const char *what = getenv("DYDIT_HIDE");
  if (what == NULL || (strcmp(what, "avx512") && strcmp(what, "vnni"))) return;
  only_vnni = !strcmp(what, "vnni");
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  if (sigaction(SIGSEGV, &action, NULL) || faulting(1)) _exit(77);
}
