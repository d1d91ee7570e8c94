/* Faults in the calls that change files below a folder, for tests/stress/workshop.py: LD_PRELOAD.
   inject_arm(root, kind, at, log) counts from 1 every call that opens a file for writing, writes,
   resizes, syncs, renames, links, makes a folder or deletes; call number `at` suffers the fault. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, ENOSPC_FROM, EDQUOT_FROM, EROFS_FROM, EIO_ONCE, SHORT_ONCE, RENAME_ONCE, KILL };
enum { OPEN = 1, WRITE, RESIZE, SYNC, RENAME, LINK, MKDIR, DELETE };
static const char *names[] = {"", "open", "write", "resize", "sync", "rename", "link", "mkdir",
                              "delete"};
static char root[PATH_MAX], *paths[65536];
static int kind, at, log_fd = -1;
static volatile int count;

void inject_arm(const char *folder, int new_kind, int new_at, const char *log) {
  snprintf(root, sizeof root, "%s", folder);
  kind = new_kind, at = new_at, count = 0;
  log_fd = *log ? (int)syscall(SYS_openat, AT_FDCWD, log, O_CREAT | O_WRONLY | O_APPEND, 0644) : -1;
}

static int below(const char *path) { return *root && !strncmp(path, root, strlen(root)); }

static const char *absolute(int folder, const char *path, char *buffer) {
  char link[64];
  if (*path == '/') return path;
  if (folder == AT_FDCWD) {
    if (!getcwd(buffer, PATH_MAX)) return path;
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t n = readlink(link, buffer, PATH_MAX - 1);
    if (n < 0) return path;
    buffer[n] = 0;
  }
  size_t length = strlen(buffer);
  snprintf(buffer + length, PATH_MAX - length, "/%s", path);
  return buffer;
}

/* Whether call `what` on `path` fails, with errno; -1: a write is to be short. */
static int fails(int what, const char *path) {
  char line[PATH_MAX + 64];
  if (!kind && log_fd < 0) return 0;
  int n = __sync_add_and_fetch(&count, 1), error = 0;
  if (log_fd >= 0) {
    int size = snprintf(line, sizeof line, "%d %s %s\n", n, names[what], path + strlen(root));
    syscall(SYS_write, log_fd, line, size);
  }
  if (kind == KILL && n == at) syscall(SYS_kill, getpid(), SIGKILL);
  int takes_room = what == WRITE || what == OPEN || what == MKDIR || what == LINK;
  if (kind == ENOSPC_FROM && n >= at && takes_room) error = ENOSPC;
  if (kind == EDQUOT_FROM && n >= at && takes_room) error = EDQUOT;
  if (kind == EROFS_FROM && n >= at && what != SYNC) error = EROFS;
  if (kind == EIO_ONCE && n == at) error = EIO;
  if (kind == RENAME_ONCE && n == at && (what == RENAME || what == LINK)) error = EIO;
  if (kind == SHORT_ONCE && n == at && what == WRITE) return -1;
  errno = error;
  return error;
}

static const char *path_of(int fd) {
  return fd >= 0 && fd < 65536 ? paths[fd] : 0;
}

static int opened(int folder, const char *path, int flags, mode_t mode) {
  char buffer[PATH_MAX];
  int changes = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
  const char *whole = *root && changes ? absolute(folder, path, buffer) : "";
  int ours = *whole && below(whole);
  if (ours && fails(OPEN, whole)) return -1;
  int fd = (int)syscall(SYS_openat, folder, path, flags, mode);
  if (fd >= 0 && fd < 65536) paths[fd] = ours ? strdup(whole) : 0;
  return fd;
}

#define MODE(flags)                                                          \
  mode_t mode = 0;                                                           \
  if (flags & (O_CREAT | O_TMPFILE)) {                                       \
    va_list more;                                                            \
    va_start(more, flags);                                                   \
    mode = va_arg(more, mode_t);                                             \
    va_end(more);                                                            \
  }
int open(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags, mode); }
int openat(int at_fd, const char *path, int flags, ...) { MODE(flags) return opened(at_fd, path, flags, mode); }
int openat64(int at_fd, const char *path, int flags, ...) { MODE(flags) return opened(at_fd, path, flags, mode); }

int close(int fd) {
  if (fd >= 0 && fd < 65536) paths[fd] = 0;
  return (int)syscall(SYS_close, fd);
}

#define SIZED(call, whole, half)                                             \
  const char *path = path_of(fd);                                            \
  int fault = path ? fails(WRITE, path) : 0;                                 \
  if (fault > 0) return -1;                                                  \
  return fault < 0 ? half : whole;

ssize_t write(int fd, const void *data, size_t size) {
  SIZED(write, syscall(SYS_write, fd, data, size), syscall(SYS_write, fd, data, (size + 1) / 2))
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t place) {
  SIZED(pwrite, syscall(SYS_pwrite64, fd, data, size, place),
        syscall(SYS_pwrite64, fd, data, (size + 1) / 2, place))
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t place) {
  return pwrite64(fd, data, size, place);
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
  SIZED(writev, syscall(SYS_writev, fd, parts, n),
        syscall(SYS_write, fd, parts[0].iov_base, (parts[0].iov_len + 1) / 2))
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ON_FD(what, fd, call)                                                \
  const char *path = path_of(fd);                                            \
  if (path && fails(what, path) > 0) return -1;                              \
  return call;
int fsync(int fd) { ON_FD(SYNC, fd, (int)syscall(SYS_fsync, fd)) }
int fdatasync(int fd) { ON_FD(SYNC, fd, (int)syscall(SYS_fdatasync, fd)) }
int ftruncate(int fd, off_t size) { ON_FD(RESIZE, fd, (int)syscall(SYS_ftruncate, fd, size)) }
int ftruncate64(int fd, off64_t size) { ON_FD(RESIZE, fd, (int)syscall(SYS_ftruncate, fd, size)) }

#define ON_PATH(what, folder, name, call)                                    \
  char buffer[PATH_MAX];                                                     \
  const char *whole = *root ? absolute(folder, name, buffer) : "";           \
  if (*whole && below(whole) && fails(what, whole) > 0) return -1;           \
  return call;
int rename(const char *a, const char *b) { ON_PATH(RENAME, AT_FDCWD, b, REAL(rename)(a, b)) }
int renameat(int d, const char *a, int e, const char *b) { ON_PATH(RENAME, e, b, REAL(renameat)(d, a, e, b)) }
int link(const char *a, const char *b) { ON_PATH(LINK, AT_FDCWD, b, REAL(link)(a, b)) }
int mkdir(const char *a, mode_t m) { ON_PATH(MKDIR, AT_FDCWD, a, REAL(mkdir)(a, m)) }
int mkdirat(int d, const char *a, mode_t m) { ON_PATH(MKDIR, d, a, REAL(mkdirat)(d, a, m)) }
int unlink(const char *a) { ON_PATH(DELETE, AT_FDCWD, a, REAL(unlink)(a)) }
int unlinkat(int d, const char *a, int f) { ON_PATH(DELETE, d, a, REAL(unlinkat)(d, a, f)) }
int rmdir(const char *a) { ON_PATH(DELETE, AT_FDCWD, a, REAL(rmdir)(a)) }
