/* Measures how long one byte there and back takes over TCP.
 *
 *   pingpong serve PORT                           answers, one connection after the other
 *   pingpong request ADDRESS PORT SECONDS         over one connection
 *   pingpong connect ADDRESS PORT SECONDS         connect, one byte there and back, and close, each time anew
 *
 * IPv4 and IPv6. What was measured goes to standard output as JSON, times in microseconds. bench/network.py
 * compiles it: an interpreter at both ends would take longer than the way between them.
 */
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 1 << 22, WAIT_SECONDS = 5 };

static void fail(const char *what)
{
    fprintf(stderr, "pingpong: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static double processor_time(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1e6 + u.ru_utime.tv_usec + u.ru_stime.tv_usec;
}

/* Without this, bytes would wait for each other, and a server that is gone would be waited for without end. */
static void prepare(int s)
{
    int on = 1;
    struct timeval wait = {.tv_sec = WAIT_SECONDS};
    setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
    setsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof wait);
}

static void serve(int port)
{
    struct sockaddr_in6 here = {.sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = in6addr_any};
    int on = 1, both = 0, listener = socket(AF_INET6, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(listener, IPPROTO_IPV6, IPV6_V6ONLY, &both, sizeof both);
    if (bind(listener, (struct sockaddr *)&here, sizeof here) || listen(listener, 64))
        fail("listen");
    for (;;) {
        char byte;
        int s = accept(listener, NULL, NULL);
        if (s < 0)
            continue;
        prepare(s);
        while (read(s, &byte, 1) == 1 && write(s, &byte, 1) == 1)
            ;
        close(s);
    }
}

static int connected(const struct addrinfo *to)
{
    int s = socket(to->ai_family, SOCK_STREAM, 0);
    prepare(s);
    if (s < 0 || connect(s, to->ai_addr, to->ai_addrlen))
        fail("connect");
    return s;
}

static void there_and_back(int s)
{
    char byte = 'x';
    if (write(s, &byte, 1) != 1 || read(s, &byte, 1) != 1)
        fail("one byte there and back");
}

static int by_size(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void measure(const struct addrinfo *to, double seconds, int anew)
{
    static float taken[MOST];
    /* A close that resets: neither end then has a port that waits for a minute. */
    const struct linger reset = {.l_onoff = 1};
    int count = 0, s = anew ? -1 : connected(to);
    double start = now(), before = start, after = start, cpu = processor_time();

    while (after < start + seconds * 1e6 && count < MOST) {
        if (anew)
            s = connected(to);
        there_and_back(s);
        if (anew) {
            setsockopt(s, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
            close(s);
        }
        after = now();
        taken[count++] = after - before;
        before = after;
    }
    cpu = processor_time() - cpu;
    qsort(taken, count, sizeof *taken, by_size);
    printf("{\"count\": %d, \"mean\": %.3f, \"p50\": %.3f, \"p99\": %.3f, \"cpu\": %.3f}\n", count,
           (after - start) / count, taken[count / 2], taken[(int)(count * 0.99)], cpu / count);
}

int main(int argc, char **argv)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (argc == 3 && !strcmp(argv[1], "serve"))
        serve(atoi(argv[2]));
    if (argc != 5)
        return 2;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICHOST}, *to;
    if (getaddrinfo(argv[2], argv[3], &hints, &to))
        fail("address");
    measure(to, atof(argv[4]), !strcmp(argv[1], "connect"));
}
