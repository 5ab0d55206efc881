// SPDX-License-Identifier: MIT
/* Dovecot plugin: an idling IMAP client is told of new mail at once, and hibernation loses nothing.

   Dovecot's own watch of a maildir (lib-storage/mailbox-watch.c) waits 500 ms after each event. When a
   session hibernates, it hands a fresh inotify instance to imap-hibernate: an event that waits in those
   500 ms, or that nobody has read yet, is then told to nobody until the next one.

   This plugin watches beside it, with one inotify instance for the whole imap process:

   - an event calls the mailbox's notify callback at once, in the context of its session;
   - each watching mailbox is in a list of ours, so all sessions of one user in one process are told.
     Dovecot's own watches of one directory share a descriptor, and only the last one is called;
   - a mailbox that stops to be watched while an event is untold makes a new event, which the
     successor's fresh instance sees;
   - what sessions have left of the heap goes back to the kernel: a process that once held a hundred
     sessions may go on with one.

   Dovecot's own watch, and the stat() every 30 seconds behind it, stay: hibernation takes the list of
   directories from it, and it is what is left where ours cannot be had (see start_watching). */

#include "config.h"
#include "lib.h"
#include "hostpid.h"
#include "ioloop.h"
#include "llist.h"
#include "mail-storage-hooks.h"
#include "mail-storage-private.h"
#include "module-context.h"

#include <fcntl.h>
#include <malloc.h>
#include <sys/inotify.h>
#include <unistd.h>

/* What adds, removes or renames a message. Content is written in tmp/, which nobody watches. */
#define WATCH_MASK (IN_CREATE | IN_DELETE | IN_MOVE | IN_ONLYDIR)

/* Room for a hundred events of usual names; one of the longest name needs 272 bytes. */
#define EVENT_BUFFER_SIZE 8192

/* See hold_stock_delay(): any time longer than a session. Dovecot wants it to fit an int. */
#define HOLD_MSECS (24U * 3600 * 1000)

/* By then a wave of hibernations is through; malloc_trim() takes a millisecond or two. */
#define TRIM_MSECS (5U * 1000)

#define NO_WATCH (-1)

enum { WATCH_NEW, WATCH_CUR, WATCHES };
static const char *const watched_dirs[WATCHES] = { "new", "cur" };

/* What we know of a mailbox; allocated from its pool, so it lives as long as the mailbox does. */
struct notify_mailbox {
	union mailbox_module_context module_ctx;
	struct mailbox *box;
	/* while it is watched: neighbours in the list, the session's context (log prefix, events) */
	struct notify_mailbox *prev, *next;
	struct ioloop_context *session_ctx;
	int watches[WATCHES];
	bool watched:1;
	/* an event was read, and the callback has not been called yet */
	bool pending:1;
};

#define NOTIFY_CONTEXT(obj) MODULE_CONTEXT_REQUIRE(obj, chatmail_notify_module)
static MODULE_CONTEXT_DEFINE_INIT(chatmail_notify_module, &mail_storage_module_register);

void chatmail_notify_plugin_init(struct module *module);
void chatmail_notify_plugin_deinit(void);
extern const char *chatmail_notify_plugin_version;

/* Dovecot refuses a plugin, and with it every login, if this is not its own version. */
const char *chatmail_notify_plugin_version = DOVECOT_ABI_VERSION;

/* Of the process. The instance exists while at least one mailbox is watched. */
static int inotify_fd = -1;
static struct io *inotify_io;
static struct timeout *to_tell, *to_trim;
static struct notify_mailbox *watched_mailboxes;

static bool has_watch(const struct notify_mailbox *nbox, int watch)
{
	return nbox->watches[WATCH_NEW] == watch || nbox->watches[WATCH_CUR] == watch;
}

static bool is_watch_used(int watch)
{
	for (const struct notify_mailbox *nbox = watched_mailboxes; nbox != NULL; nbox = nbox->next) {
		if (has_watch(nbox, watch))
			return TRUE;
	}
	return FALSE;
}

/* A timer of the process: without the context of the session that happens to start it. */
static struct timeout *add_process_timeout(unsigned int msecs, timeout_callback_t *callback)
{
	struct ioloop *ioloop = io_loop_get_root();
	struct ioloop_context *ctx = io_loop_get_current_context(ioloop);
	struct timeout *to;

	if (ctx != NULL)
		io_loop_context_deactivate(ctx);
	to = timeout_add_short_to(ioloop, msecs, *callback, NULL);
	if (ctx != NULL)
		io_loop_context_activate(ctx);
	return to;
}

static void give_memory_back(void *context ATTR_UNUSED)
{
	timeout_remove(&to_trim);
	(void)malloc_trim(0);
}

/* ---- telling ---------------------------------------------------------------------------------- */

static void stock_delay_held(struct mailbox *box ATTR_UNUSED)
{
	/* nothing: the timer only holds the place */
}

/* Keep Dovecot's own watch from calling the callback a second time, 500 ms after us: it starts its
   timer only where there is none. Dovecot removes the timer when the mailbox is no longer watched, and
   when its stat() finds a change; after that, our next event holds the place again. */
static void hold_stock_delay(struct mailbox *box)
{
	timeout_remove(&box->to_notify_delay);
	box->to_notify_delay = timeout_add(HOLD_MSECS, stock_delay_held, box);
}

/* Call the callback as Dovecot's ioloop would: in the context of the session. It may end the session,
   and this or any other mailbox with it. */
static void tell(struct notify_mailbox *nbox)
{
	struct mailbox *box = nbox->box;
	struct ioloop *ioloop = io_loop_get_root();
	struct ioloop_context *ctx;

	nbox->pending = FALSE;
	if (nbox->session_ctx != NULL)
		io_loop_context_activate(nbox->session_ctx);
	hold_stock_delay(box);
	T_BEGIN {
		box->notify_callback(box, box->notify_context);
	} T_END;
	ctx = io_loop_get_current_context(ioloop);
	if (ctx != NULL)
		io_loop_context_deactivate(ctx);
}

static void tell_pending(void)
{
	struct notify_mailbox *nbox = watched_mailboxes;

	while (nbox != NULL) {
		if (!nbox->pending) {
			nbox = nbox->next;
			continue;
		}
		tell(nbox);
		/* the list may be another one now; who was told is not pending, so this ends */
		nbox = watched_mailboxes;
	}
}

/* ---- events ----------------------------------------------------------------------------------- */

static void handle_event(const struct inotify_event *event)
{
	bool overflow = (event->mask & IN_Q_OVERFLOW) != 0;

	/* maildir ignores such names; one is what wake_successor() makes */
	if (event->len > 0 && event->name[0] == '.')
		return;
	for (struct notify_mailbox *nbox = watched_mailboxes; nbox != NULL; nbox = nbox->next) {
		if (!overflow && !has_watch(nbox, event->wd))
			continue;
		nbox->pending = TRUE;
		if ((event->mask & IN_IGNORED) == 0)
			continue;
		/* the directory is gone, and the kernel's watch with it */
		for (unsigned int i = 0; i < WATCHES; i++) {
			if (nbox->watches[i] == event->wd)
				nbox->watches[i] = NO_WATCH;
		}
	}
}

/* Read all events there are, and mark the mailboxes they are about. */
static void read_events(void)
{
	unsigned char buf[EVENT_BUFFER_SIZE] __attribute__((aligned(__alignof__(struct inotify_event))));
	size_t size, pos;
	ssize_t ret;

	/* the kernel gives whole events only */
	while ((ret = read(inotify_fd, buf, sizeof(buf))) > 0 || (ret < 0 && errno == EINTR)) {
		size = ret < 0 ? 0 : ret;
		pos = 0;

		while (size - pos >= sizeof(struct inotify_event)) {
			const struct inotify_event *event = (const void *)(buf + pos);

			if (event->len > size - pos - sizeof(*event))
				break;
			handle_event(event);
			pos += sizeof(*event) + event->len;
		}
	}
	if (ret < 0 && errno != EAGAIN)
		i_error("chatmail_notify: read(inotify) failed: %m");
}

static void inotify_input(void *context ATTR_UNUSED)
{
	read_events();
	tell_pending();
}

static void tell_later(void *context ATTR_UNUSED)
{
	timeout_remove(&to_tell);
	tell_pending();
}

/* ---- the instance, and its watches -------------------------------------------------------------- */

static bool open_inotify(void)
{
	struct ioloop *ioloop = io_loop_get_root();
	struct ioloop_context *ctx = io_loop_get_current_context(ioloop);

	if (inotify_fd != -1)
		return TRUE;
	inotify_fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
	if (inotify_fd == -1)
		return FALSE;
	/* it belongs to no session: without the context of the one that happens to be the first */
	if (ctx != NULL)
		io_loop_context_deactivate(ctx);
	inotify_io = io_add_to(ioloop, inotify_fd, IO_READ, inotify_input, NULL);
	if (ctx != NULL)
		io_loop_context_activate(ctx);
	return TRUE;
}

static void close_inotify(void)
{
	timeout_remove(&to_tell);
	io_remove(&inotify_io);
	i_close_fd(&inotify_fd);
}

static void remove_watches(struct notify_mailbox *nbox)
{
	for (unsigned int i = 0; i < WATCHES; i++) {
		int watch = nbox->watches[i];

		nbox->watches[i] = NO_WATCH;
		/* EINVAL: the directory is gone, and we have not read that yet */
		if (watch != NO_WATCH && !is_watch_used(watch) &&
		    inotify_rm_watch(inotify_fd, watch) < 0 && errno != EINVAL)
			e_error(nbox->box->event, "chatmail_notify: inotify_rm_watch() failed: %m");
	}
	if (watched_mailboxes == NULL)
		close_inotify();
}

/* Without an instance or a watch, which the kernel limits by user, everything is as without this
   plugin; Dovecot's own watch says so in the log. */
static void start_watching(struct notify_mailbox *nbox)
{
	struct ioloop *ioloop = io_loop_get_root();
	const char *path = mailbox_get_path(nbox->box);

	if (!open_inotify())
		return;
	for (unsigned int i = 0; i < WATCHES; i++) {
		const char *dir = t_strdup_printf("%s/%s", path, watched_dirs[i]);

		nbox->watches[i] = inotify_add_watch(inotify_fd, dir, WATCH_MASK);
		if (nbox->watches[i] == NO_WATCH) {
			remove_watches(nbox);
			return;
		}
	}
	nbox->session_ctx = io_loop_get_current_context(ioloop);
	if (nbox->session_ctx != NULL)
		io_loop_context_ref(nbox->session_ctx);
	nbox->pending = FALSE;
	nbox->watched = TRUE;
	DLLIST_PREPEND(&watched_mailboxes, nbox);
	hold_stock_delay(nbox->box);
}

/* Make an event in new/, by a name that maildir ignores. Whoever watches the directory since now looks
   at it, and finds what we were not to tell any more. */
static void wake_successor(struct notify_mailbox *nbox)
{
	const char *path = t_strdup_printf("%s/%s/.chatmail-notify.%s",
					   mailbox_get_path(nbox->box),
					   watched_dirs[WATCH_NEW], my_pid);
	int fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC | O_NOFOLLOW, 0600);

	/* ENOENT: the account was deleted */
	if (fd == -1 && errno != ENOENT)
		e_error(nbox->box->event, "chatmail_notify: open(%s) failed: %m", path);
	if (fd != -1)
		i_close_fd(&fd);
	/* one of these two is an event, even if the file was left by a process that was killed here */
	if (unlink(path) < 0 && errno != ENOENT)
		e_error(nbox->box->event, "chatmail_notify: unlink(%s) failed: %m", path);
}

/* IDLE ends, or its session hibernates: this place is the same for both. After a DONE the event is
   one that nobody needs. */
static void stop_watching(struct notify_mailbox *nbox)
{
	bool others_pending = FALSE;

	if (!nbox->watched)
		return;
	read_events();
	nbox->watched = FALSE;
	DLLIST_REMOVE(&watched_mailboxes, nbox);
	if (nbox->pending)
		wake_successor(nbox);
	nbox->pending = FALSE;
	if (nbox->session_ctx != NULL)
		io_loop_context_unref(&nbox->session_ctx);
	remove_watches(nbox);

	/* Those whose events were just read are told, but not from here, in the middle of the end of
	   another session. */
	for (const struct notify_mailbox *other = watched_mailboxes; other != NULL; other = other->next)
		others_pending = others_pending || other->pending;
	if (others_pending && to_tell == NULL)
		to_tell = add_process_timeout(0, tell_later);
	if (to_trim == NULL)
		to_trim = add_process_timeout(TRIM_MSECS, give_memory_back);
}

/* ---- hooks --------------------------------------------------------------------------------------- */

static void chatmail_notify_changes(struct mailbox *box)
{
	struct notify_mailbox *nbox = NOTIFY_CONTEXT(box);

	stop_watching(nbox);
	nbox->module_ctx.super.notify_changes(box);
	if (box->notify_callback != NULL)
		start_watching(nbox);
}

static void chatmail_notify_close(struct mailbox *box)
{
	struct notify_mailbox *nbox = NOTIFY_CONTEXT(box);

	stop_watching(nbox);
	nbox->module_ctx.super.close(box);
}

static void chatmail_notify_mailbox_allocated(struct mailbox *box)
{
	struct mailbox_vfuncs *v = box->vlast;
	struct notify_mailbox *nbox;

	/* other formats have other files to watch */
	if (strcmp(box->storage->name, "maildir") != 0)
		return;
	nbox = p_new(box->pool, struct notify_mailbox, 1);
	nbox->box = box;
	for (unsigned int i = 0; i < WATCHES; i++)
		nbox->watches[i] = NO_WATCH;
	nbox->module_ctx.super = *v;
	box->vlast = &nbox->module_ctx.super;
	v->notify_changes = chatmail_notify_changes;
	v->close = chatmail_notify_close;
	MODULE_CONTEXT_SET(box, chatmail_notify_module, nbox);
}

static struct mail_storage_hooks chatmail_notify_hooks = {
	.mailbox_allocated = chatmail_notify_mailbox_allocated,
};

void chatmail_notify_plugin_init(struct module *module)
{
	mail_storage_hooks_add(module, &chatmail_notify_hooks);
}

void chatmail_notify_plugin_deinit(void)
{
	/* all mailboxes are closed by now */
	mail_storage_hooks_remove(&chatmail_notify_hooks);
	close_inotify();
	timeout_remove(&to_trim);
}
